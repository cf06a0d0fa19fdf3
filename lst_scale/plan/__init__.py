"""What a recipe will need before anything is loaded: a step of the real code on tensors that have shapes and no contents."""
