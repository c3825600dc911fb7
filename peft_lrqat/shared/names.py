"""Names and numbers in saved files."""

# What PEFT puts before a module's name in the file of an adapter.
PREFIX = "base_model.model."
# Of packed exports: 1; 5 with balanced grids, which releases before would take for symmetric ones;
# 7 with the weights of experts.
# The numbers between are those of low-bit bases, whose `config.json` looks alike.
PACKED_VERSIONS = 1, 5, 7
