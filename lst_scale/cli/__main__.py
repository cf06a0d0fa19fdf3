"""`python -m lst_scale.cli`, for launchers that want a module."""

from lst_scale.cli.main import main

main()
