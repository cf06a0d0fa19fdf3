"""T5Gemma 2: encoder-decoders made of Gemma 3, whose decoder attends to its own past and to the source at once."""
