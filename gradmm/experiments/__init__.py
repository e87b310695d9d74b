"""What the notebooks measure with gradmm; the method itself imports nothing from here."""
