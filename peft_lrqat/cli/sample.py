"""Options for a sample of a text, and the sample."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from transformers.utils import logging

from peft_lrqat.trainer.data import load_blocks


logger = logging.get_logger(__name__)


@dataclass(kw_only=True)
class SampleOptions:
    """How a text becomes examples."""

    split: str = field(default="train", metadata={"help": "split of --dataset, if it has several"})
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    block_size: int = field(default=512, metadata={"help": "tokens in an example"})

    def sample(
        self,
        dataset: Sequence[str],
        model: str,
        revision: str | None,
        tokens: int,
        option: str,
    ) -> Dataset:
        """Blocks of token ids with labels, chosen at random.

        Args:
            dataset: as `load_blocks` takes it.
            model, revision: whose tokenizer.
            tokens: in all blocks.
            option: which asked for so many tokens, for the message where the text has fewer.
        """
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision or "main")
        blocks: Any = load_blocks(
            dataset,
            tokenizer,
            block_size=self.block_size,
            split=self.split,
            text_column=self.text_column,
        )
        wanted = max(1, tokens // self.block_size)
        if len(blocks) < wanted:
            logger.warning(
                f"--dataset has {len(blocks) * self.block_size:,} tokens in whole blocks, which "
                f"is less than {option} {tokens:,}; all are used"
            )
        return blocks.shuffle(seed=0).select(range(min(wanted, len(blocks))))
