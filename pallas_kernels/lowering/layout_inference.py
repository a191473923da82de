"""One pass of JAX's Mosaic GPU, made faster where it is slow: `install` it before a kernel is lowered.

Layout inference wants the sets of equal variables in a reproducible order, and sorts them by their text. The text of a
variable is that of its operation, for which MLIR numbers every value of the kernel, and that of a loop is all that
stands in it. Products have loops of thousands of operations, unrolled, that carry all their sums: the texts were 24 of
the 54 s in which the FP8 step of configs/v3_5b.py was lowered (jax 0.11.2, one CPU core).

The order in which constraints mention the variables is as reproducible and costs nothing. All 69 kernels of that step
stay the same, byte for byte.
"""

import jax
from jax.experimental.mosaic.gpu import constraints

PRINTS_VARIABLES = (0, 12)  # seen in 0.11.2; not replaced from this version on


def equal_variables(system: constraints.ConstraintSystem) -> dict[constraints.Variable, list[constraints.Variable]]:
    """Return, for each variable of an equation, the others that it equals, directly or not."""
    sets: dict[constraints.Variable, list[constraints.Variable]] = {}
    for constraint in system.constraints:
        match constraint:
            case constraints.Equals(lhs=constraints.Variable() as left, rhs=constraints.Variable() as right):
                one, other = (sets.setdefault(variable, [variable]) for variable in (left, right))
                if one is not other:
                    one += other
                    sets.update(dict.fromkeys(other, one))
    return {variable: [other for other in equal if other != variable] for variable, equal in sets.items()}


def install() -> None:
    """Make JAX use `equal_variables`, where its own is slow; whoever builds a kernel for Hopper calls this."""
    if jax.__version_info__ < PRINTS_VARIABLES:
        constraints.compute_transitively_equal_vars = equal_variables
