"""What a training step of one layer costs on paper: bytes, products, and the time they take at
least.

    python benchmarks/limits.py          # a table for two cards

Each kernel takes the longest of three times: its bytes over the bandwidth of the memory, its
products of tokens over the rate of the matrix units, and the float32 products of B @ A over the
rate of the other units. A step is the sum over its kernels; nothing runs beside another.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """Rates by the maker's data sheet, without sparsity."""

    bandwidth: float  # bytes a second
    matrix: float  # bfloat16 operations a second, summed in float32
    float32: float


CARDS = {
    "H100 SXM": Card(3.35e12, 989e12, 67e12),
    "RTX 4090": Card(1.008e12, 165e12, 82.6e12),
}


@dataclass(frozen=True)
class Kernel:
    """What one kernel moves and computes."""

    name: str
    bytes: float
    matrix: float = 0.0
    float32: float = 0.0

    def seconds(self, card: Card) -> float:
        return max(
            self.bytes / card.bandwidth, self.matrix / card.matrix, self.float32 / card.float32
        )


@dataclass(frozen=True)
class Step:
    """One bfloat16 layer, forward and backward, in bfloat16 on a number of tokens."""

    out: int
    width: int
    tokens: int
    rank: int = 32

    @property
    def _weight(self) -> float:
        return self.out * self.width

    def _product(self, name: str, rows: int, inner: int, columns: int) -> Kernel:
        size = rows * inner + inner * columns + rows * columns
        return Kernel(name, 2 * size, matrix=2 * rows * inner * columns)

    def _of_tokens(self, name: str, *sizes: int) -> Kernel:
        return Kernel(name, 2 * self.tokens * sum(sizes))

    def frozen(self) -> list[Kernel]:
        """The layer without anything trained: what every variant pays."""
        return [
            self._product("y = x @ W.T", self.tokens, self.width, self.out),
            self._product("dx = gy @ W", self.tokens, self.out, self.width),
        ]

    def _through_rank(self) -> list[Kernel]:
        return [
            self._product("x @ A.T", self.tokens, self.width, self.rank),
            self._product("gy @ B", self.tokens, self.out, self.rank),
            self._product("dB", self.out, self.tokens, self.rank),
            self._product("dA", self.rank, self.tokens, self.width),
        ]

    def lora(self) -> list[Kernel]:
        """PEFT's LoRA with bfloat16 factors, operator by operator."""
        out, width = self.out, self.width
        return [
            *self.frozen(),
            *self._through_rank(),
            self._product("(x @ A.T) @ B.T", self.tokens, self.rank, out),
            self._of_tokens("times gamma", out, out),
            self._of_tokens("added to y", out, out, out),
            self._of_tokens("gy times gamma", out, out),
            self._product("(gy @ B) @ A", self.tokens, self.rank, width),
            self._of_tokens("added to dx", width, width, width),
        ]

    def _made(self, name: str, phi_bytes: float, more: float = 0.0) -> Kernel:
        """W_hat from phi (and `more` bytes of each weight), with B @ A in float32."""
        size = self._weight * (phi_bytes + 2 + more)
        return Kernel(name, size, float32=2 * self.rank * self._weight)

    def per_row(self, phi_bytes: float = 1.0) -> list[Kernel]:
        """LR-QAT with one scale per row and no clipped weight."""
        return [
            *self.frozen(),
            *self._through_rank(),
            self._made("W_hat, forward", phi_bytes),
            self._made("W_hat, backward", phi_bytes),
            self._of_tokens("sums for the scales", self.out, self.out),
        ]

    def groups(self, phi_bytes: float = 1.0) -> list[Kernel]:
        """LR-QAT with groups: G is formed, turned into dZ, and multiplied with the factors."""
        return [
            *self.frozen(),
            self._made("W_hat, forward", phi_bytes),
            self._product("G = gy.T @ x", self.out, self.tokens, self.width),
            self._made("W_hat and dZ from G", phi_bytes, more=4),
            self._product("dB", self.out, self.width, self.rank),
            self._product("dA", self.rank, self.out, self.width),
        ]


def seconds(kernels: list[Kernel], card: Card) -> float:
    return sum(kernel.seconds(card) for kernel in kernels)


def table(card: Card, shapes: list[tuple[int, int]], tokens: list[int]) -> str:
    """Milliseconds of LoRA, and the ratio of LR-QAT to it."""
    lines = [
        f"{'layer':>14} {'tokens':>7} {'LoRA, ms':>9} {'per row':>8} {'int4':>6} {'groups':>7} "
        f"{'MB more':>8} {'GFLOP more':>11}"
    ]
    for out, width in shapes:
        for number in tokens:
            step = Step(out, width, number)
            lora = step.lora()
            reference = seconds(lora, card)
            ratios = [
                seconds(way, card) / reference
                for way in (step.per_row(), step.per_row(0.5), step.groups())
            ]
            more = sum(k.bytes for k in step.per_row()) - sum(k.bytes for k in lora)
            products = sum(k.matrix + k.float32 for k in step.per_row())
            products -= sum(k.matrix + k.float32 for k in lora)
            lines.append(
                f"{out:>6} x {width:<5} {number:>7} {1e3 * reference:9.3f} {ratios[0]:8.2f} "
                f"{ratios[1]:6.2f} {ratios[2]:7.2f} {more / 1e6:8.0f} {products / 1e9:11.1f}"
            )
    return "\n".join(lines)


def main() -> None:
    shapes = [(4096, 4096), (11008, 4096), (4096, 11008)]
    for name, card in CARDS.items():
        print(f"{name}\n{table(card, shapes, [512, 2048, 8192])}\n")


if __name__ == "__main__":
    main()
