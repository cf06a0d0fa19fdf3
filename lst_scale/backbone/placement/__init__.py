"""Where the frozen backbone's blocks are: on one device, divided over many, streamed."""
