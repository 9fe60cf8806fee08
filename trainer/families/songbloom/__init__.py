"""SongBloom: lyrics and ten seconds of style become sketch tokens and VAE latents, a block of 16 frames at a time."""
