"""ACE-Step v1: tags and lyrics become DCAE latents by flow matching."""
