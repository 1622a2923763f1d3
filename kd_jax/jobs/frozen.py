"""What a step reads and never changes, by name: which teachers, and where they lie on the mesh."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from kd_jax.models.functional import Functional
from kd_jax.models.projection import WithProjections
from kd_jax.trainer.mesh import Rules, describe_shardings, replicated, shardings


@dataclass(frozen=True)
class Frozen:
    """The entries of the step's `frozen`; hashable, so that equal jobs share one compilation.

    teachers: whose parameters frozen["teachers"] holds. decoder: the teacher whose (table, bias) frozen["decoder"]
    holds, where its hidden states come from a cache. whole: names of small arrays that lie on every device.
    """

    teachers: tuple[Functional, ...] = ()
    decoder: Functional | None = None
    whole: tuple[str, ...] = ()

    def layout(self, mesh: jax.sharding.Mesh, rules: Rules) -> dict[str, Any]:
        """The sharding of every entry; `rules` are those of the teacher."""
        found: dict[str, Any] = dict.fromkeys((*self.whole, "seed"), replicated(mesh))
        if self.teachers:
            found["teachers"] = tuple(model_layout(teacher, mesh, rules) for teacher in self.teachers)
        if self.decoder is not None:
            found["decoder"] = self.decoder.decoder(model_layout(self.decoder, mesh, rules))
        return found

    def abstract(self, whole: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        """The same entries as jax.ShapeDtypeStruct; whole: the shapes of the small arrays, which hold int32."""
        found: dict[str, Any] = {name: jax.ShapeDtypeStruct(whole[name], np.int32) for name in self.whole}
        found["seed"] = jax.ShapeDtypeStruct((), np.int32)
        if self.teachers:
            found["teachers"] = tuple(teacher.abstract() for teacher in self.teachers)
        if self.decoder is not None:
            found["decoder"] = self.decoder.decoder(self.decoder.abstract())
        return found

    def describe(self, mesh: jax.sharding.Mesh, rules: Rules) -> list[str]:
        """The table of what of the teachers is sharded how, as lines."""
        lines, layout = [], self.layout(mesh, rules)
        for number, teacher in enumerate(self.teachers):
            lines += describe_shardings(teacher.abstract(), layout["teachers"][number], "teacher, frozen:")
        if self.decoder is not None:
            abstract = self.decoder.decoder(self.decoder.abstract())
            lines += describe_shardings(abstract, layout["decoder"], "teacher's decoder, frozen:")
        return lines


def model_layout(model: Functional | WithProjections, mesh: jax.sharding.Mesh, rules: Rules) -> Any:
    """The sharding of every parameter of a model."""
    return shardings(mesh, model.logical_axes(), model.abstract(), rules)


def placed(values: np.ndarray, sharding: jax.sharding.NamedSharding) -> jax.Array:
    """An array of which every device gets its own part, read from `values`, which may be memory-mapped."""
    return jax.make_array_from_callback(values.shape, sharding, lambda index: np.ascontiguousarray(values[index]))
