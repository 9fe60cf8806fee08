"""fish-speech 1.4 and 1.5: text becomes FireflyGAN codes, by a slow network over frames and a fast one inside each."""
