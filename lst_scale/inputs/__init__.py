"""What data makes and a backbone is given: the one record that both rooms know, though they do not see each other."""
