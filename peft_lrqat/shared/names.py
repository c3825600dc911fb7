"""Names of modules in saved adapters."""

# What PEFT puts before a module's name in the file of an adapter.
PREFIX = "base_model.model."
