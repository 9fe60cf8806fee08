"""MusicGen: a description becomes EnCodec tokens, four codebooks with a delay of one frame each."""
