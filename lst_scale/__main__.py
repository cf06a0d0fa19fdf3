"""The command `lst-scale` from its first moment, also as `python -m lst_scale`: Ctrl-C during the imports is one line, too."""

from __future__ import annotations

from lst_scale.system import preemption


def main() -> None:
    preemption.leave_on_ctrl_c()
    from lst_scale.cli import main as cli

    cli.main()


if __name__ == "__main__":
    main()
