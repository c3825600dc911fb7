"""Commands that several files of tests run, and a text for them."""

import pytest

from peft_lrqat.cli import main


TEXT = "the quick brown fox jumps over the lazy dog, and the dog does not mind. " * 12


def train(base, *options, steps=3, output="out"):
    command = [
        "train",
        "--model",
        str(base),
        "--dataset",
        "text.txt",
        "--output_dir",
        output,
        "--block_size",
        "16",
    ]
    command += [
        "--target_modules",
        "all-linear",
        "--bits",
        "3",
        "--r",
        "4",
        "--max_steps",
        str(steps),
    ]
    command += ["--per_device_train_batch_size", "4", "--disable_tqdm", "true"]
    return main([*command, *options])


def refusal(capsys, argv):
    """The line on stderr that ends a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in argv])
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lrqat")]
    assert len(lines) == 1
    return lines[0]
