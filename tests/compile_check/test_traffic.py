"""Memory traffic: of programs whose reads and writes can be counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.compile_check.hlo import Program
from kd_jax.compile_check.traffic import kernel_traffic, memory_traffic

ON_CHIP = """HloModule step

ENTRY %main (x: f32[256], y: f32[256]) -> f32[256] {
  %x = f32[256]{0:T(256)} parameter(0)
  %y = f32[256]{0:T(256)S(1)} parameter(1)
  ROOT %sum = f32[256]{0:T(256)S(1)} add(%x, %y)
}
"""

# A fusion behind which a gather goes on: its arrays are handed through.
BEHIND = """HloModule step

%inside (a: f32[10], part: f32[100], whole: f32[800]) -> (f32[10], f32[100], f32[800]) {
  %a = f32[10]{0} parameter(0)
  %part = f32[100]{0} parameter(1)
  %whole = f32[800]{0} parameter(2)
  %double = f32[10]{0} add(%a, %a)
  %gather = f32[800]{0} all-gather(%part), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %results = (f32[10]{0}, f32[100]{0}, f32[800]{0}) tuple(%double, %part, %gather)
}

ENTRY %main (x: f32[10], part: f32[100], whole: f32[800]) -> (f32[10], f32[100], f32[800]) {
  %x = f32[10]{0} parameter(0)
  %part = f32[100]{0} parameter(1)
  %whole = f32[800]{0} parameter(2)
  ROOT %out = (f32[10]{0}, f32[100]{0}, f32[800]{0}) fusion(%x, %part, %whole), kind=kLoop, calls=%inside
}
"""


def traffic(function, *shapes) -> float:
    return memory_traffic(Program(jax.jit(function).lower(*shapes).compile().as_text()))


def test_on_chip_memory_and_arrays_that_are_handed_through_do_not_count():
    assert memory_traffic(Program(ON_CHIP)) == 1024
    assert memory_traffic(Program(BEHIND)) == 80


def test_an_elementwise_program_reads_and_writes_each_array_once():
    x = jax.ShapeDtypeStruct((1000, 1000), np.float32)
    assert traffic(lambda a, b: jnp.tanh(a) * b + 1, x, x) == 3 * 4e6


def test_a_loop_over_layers_reads_a_layer_at_a_time():
    layers = jax.ShapeDtypeStruct((50, 300, 300), np.float32)
    x = jax.ShapeDtypeStruct((300,), np.float32)

    def run(layers, x):
        return jax.lax.scan(lambda carry, layer: (jnp.sum(layer * carry[None, :], axis=1), None), x, layers)[0]

    counted, layer_bytes = traffic(run, layers, x), 300 * 300 * 4
    assert 50 * layer_bytes <= counted <= 4 * 50 * layer_bytes  # reading all layers every time would be 50 times that


# XLA writes a kernel's metadata over several lines.
KERNELS = """HloModule step

ENTRY %main (x: f32[10,100]) -> f32[10,100] {
  %x = f32[10,100]{1,0} parameter(0)
  %attention_forward.1 = (f32[10,100]{1,0}, f32[10]{0}) custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/attention_forward/pallas_call"}
  %mixed = f32[10,100]{1,0} get-tuple-element(%attention_forward.1), index=0, frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}
  %pallas_call.3 = f32[10,100]{1,0} custom-call(%x, %mixed), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(step)/transpose(jvp(attention_backward))/pallas_call"}
  ROOT %other = f32[10,100]{1,0} custom-call(%pallas_call.3), custom_call_target="Sharding"
}
"""  # noqa: E501


def test_a_kernel_reads_its_operands_and_writes_its_results():
    program = Program(KERNELS)
    assert kernel_traffic(program) == {"attention_forward": (1, 8040.0), "attention_backward": (1, 12_000.0)}
    assert memory_traffic(program) == 8040 + 12_000 + 8000
