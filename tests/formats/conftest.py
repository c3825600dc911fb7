"""What tests of formats and of the export share."""

from exported import llama_cpp_tokens, make_model, run_llama_cpp, tokenizer


__all__ = ["llama_cpp_tokens", "make_model", "run_llama_cpp", "tokenizer"]
