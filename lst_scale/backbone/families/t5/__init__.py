"""T5 and mT5 (v1.0, v1.1, Flan, ByT5, UL2): encoder-decoders with relative positions, RMS norms and no biases."""
