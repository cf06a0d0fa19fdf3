"""Llama and its kin (Qwen 2 and 3, Mistral, Gemma 1 to 3, Phi-3, SmolLM3, OLMo 2 and 3, Granite): decoder-only, rotary, RMS norms."""
