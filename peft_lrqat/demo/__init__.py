"""Data and a small trained model for demonstrations without a network: see `text` and `model/`."""

from peft_lrqat.demo.text import load_topics, model_path


__all__ = ["load_topics", "model_path"]
