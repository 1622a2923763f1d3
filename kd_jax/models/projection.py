"""Linear maps from a student's width to its teacher's, trained with the student and dropped after distillation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.models.functional import Functional
from kd_jax.models.layers import truncated_normal
from kd_jax.types import Params, UserError

PROJECTIONS = "projections"


@dataclasses.dataclass(frozen=True)
class WithProjections:
    """A student and its projections, each (name, inputs, outputs); hashable like the student.

    Parameters are the student's, plus, if there are projections, params["projections"][name] with a float32 "kernel"
    [inputs, outputs]. The student's parameters for a key are the same as without projections.
    """

    student: Functional
    projections: tuple[tuple[str, int, int], ...] = ()

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters from a PRNG key; may be jitted with output shardings."""

        def kernel(number: int, inputs: int, outputs: int) -> jax.Array:
            # The student folds small numbers into the same key; counting down from 2**31 - 1 never meets them.
            # With std inputs ** -0.5 projected states are about as large as the student's, so a distance has the size
            # its weight was chosen for from the first step on, and its gradient is neither blown up nor damped.
            return truncated_normal(jax.random.fold_in(key, 2**31 - 1 - number), (inputs, outputs), inputs**-0.5)

        kernels = {name: {"kernel": kernel(number, *sizes)} for number, (name, *sizes) in enumerate(self.projections)}
        return self._with(self.student.init(key), kernels)

    def abstract(self) -> Params:
        """The parameters as jax.ShapeDtypeStruct."""
        kernels = {
            name: {"kernel": jax.ShapeDtypeStruct((inputs, outputs), jnp.float32)}
            for name, inputs, outputs in self.projections
        }
        return self._with(self.student.abstract(), kernels)

    def logical_axes(self) -> Params:
        """The names of each parameter's axes, as `Functional.logical_axes` gives them."""
        return self._with(
            self.student.logical_axes(), {name: {"kernel": ("embed", None)} for name, _, _ in self.projections}
        )

    def _with(self, params: Params, projections: dict[str, Any]) -> Params:
        return {**params, PROJECTIONS: projections} if projections else params

    def has(self, name: str) -> bool:
        """Whether there is a projection of that name."""
        return any(name == other for other, _, _ in self.projections)

    def student_params(self, params: Params) -> Params:
        """The parameters of the student alone."""
        return {name: tree for name, tree in params.items() if name != PROJECTIONS}

    def project(self, params: Params, name: str, x_RxLxH: jax.Array) -> jax.Array:
        """The states at the projection's output width, in their own dtype."""
        kernel = params[PROJECTIONS][name]["kernel"]
        return jnp.einsum("rlh,ho->rlo", x_RxLxH, kernel.astype(x_RxLxH.dtype))


def needs_projection(setting: str, student_width: int, teacher_width: int, key: str) -> bool:
    """Whether states are projected before they are compared; "auto" projects where the widths differ.

    Raises UserError naming `config.<key>` if "always" would project equal widths, or "never" leaves different ones.
    """
    if setting not in ("auto", "always", "never"):
        raise UserError(f"config.{key}: {setting!r} is unknown; use auto, always or never")
    differ = student_width != teacher_width
    if setting == "always" and not differ:
        raise UserError(
            f"config.{key}: no projection is needed, as student and teacher are both {student_width} wide; use auto or "
            "never"
        )
    if setting == "never" and differ:
        raise UserError(
            f"config.{key}: a projection is missing, as the student is {student_width} wide and the teacher "
            f"{teacher_width}; use auto or always"
        )
    return differ
