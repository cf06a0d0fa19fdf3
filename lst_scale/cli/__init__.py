"""The command `lst-scale`: one file a group of commands, no logic."""
