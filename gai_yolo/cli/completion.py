"""`gai-yolo completion`: for bash, zsh and tcsh."""

from __future__ import annotations

import argparse

COMPLETION_EXAMPLES = """\
examples:
  bash   gai-yolo completion bash > ~/.local/share/bash-completion/completions/gai-yolo
  zsh    gai-yolo completion zsh > ~/.zfunc/_gai-yolo     (a folder of $fpath)
  tcsh   gai-yolo completion tcsh > ~/.gai-yolo.csh       (and source it in ~/.tcshrc)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, COMPLETION_EXAMPLES
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def completion(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print the script; returns the exit code."""
    import shtab  # only here needed

    print(shtab.complete(parser, given.shell))
    return 0
