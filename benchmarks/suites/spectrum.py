"""spectrum: from two Gram matrices, leading and all, beside torch.linalg module by module."""

from benchmarks.peers import product_eigenvalues, two_roots
from benchmarks.stand.inputs import Stacks
from benchmarks.stand.measure import Comparison, Variant
from benchmarks.stand.peer import variants
from benchmarks.stand.shapes import FLORIST_RANKS, Case, equal
from benchmarks.stand.suite import Suite, on_cases
from benchmarks.stand.tasks import ENERGY, MAX_RANK, Spectrum
from fedlora_kernels import ops

CASES = (
    Case("TinyLlama-1.1B", "q_proj", equal(3, 8), modules=22),
    Case("Llama-2-7B", "q_proj", equal(8, 16), modules=16),
    Case("Llama-2-7B", "q_proj", equal(8, 16), modules=16, family="drifted"),
    Case("Llama-3-8B", "v_proj", FLORIST_RANKS, modules=16),
    Case("Llama-2-7B", "q_proj", equal(32, 16), modules=2),
    Case("Llama-2-7B", "q_proj", equal(32, 16), modules=2, family="drifted"),
)


def compare(stacks: Stacks) -> Comparison:
    """Leading singular values at an energy, and all; beside SVD and general eigenvalues."""
    whole, leading = Spectrum(stacks), Spectrum(stacks, leading=True)
    grams, scale = whole.grams, stacks.scale
    ours = (
        Variant(
            f"energy {ENERGY}",
            lambda: ops.spectrum(*grams, scale, ENERGY, MAX_RANK),
            lambda found: [
                leading.values(found[0], leading.ranks),
                leading.vectors(found[2], found[3]),
            ],
            leading.work,
            facts=lambda found: {"rank": leading.kept, "info": int(found[4].abs().max())},
        ),
        Variant(
            "all components",
            lambda: ops.spectrum(*grams, scale),
            lambda found: [whole.values(found[0]), whole.vectors(found[2], found[3])],
            whole.work,
        ),
    )
    others = variants(whole, (two_roots.PEER, product_eigenvalues.PEER))
    return Comparison("spectrum", stacks.case, (*ours, *others))


SUITE = Suite("spectrum", on_cases(compare, CASES))
