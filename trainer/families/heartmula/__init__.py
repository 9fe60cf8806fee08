"""HeartMuLa: tags and lyrics become HeartCodec tokens, one Llama over frames and a small one over a frame's codes."""
