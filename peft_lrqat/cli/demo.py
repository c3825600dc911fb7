"""`lrqat demo`: LR-QAT against its baselines on a small model, offline."""

from collections.abc import Sequence

from peft_lrqat.demo.run import DemoArguments, check_arguments, run

from .parser import Parser


def run_demo(argv: Sequence[str]) -> int:
    """`lrqat demo`."""
    parser = Parser(
        "demo",
        "[options]",
        [DemoArguments],
        "Compares three ways to make a small language model low-bit: round-to-nearest, training\n"
        "only the scales, and LR-QAT. Runs on this machine without a network; the text is\n"
        "Python's own help topics. Prints a table, plots the losses, and checks that saved and\n"
        "merged adapters give the same perplexity to the last digit.",
        "  lrqat demo\n  lrqat demo --model smollm2 --bits 3 --output smollm2-demo",
    )
    (args,) = parser.parse(argv)
    with parser.user_errors():
        check_arguments(args)
    return run(args)
