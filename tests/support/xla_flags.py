"""XLA's flags for tests, which compile far longer than they compute."""

from importlib.metadata import version

# Without optimizing compiled code: half of the CPU time. With XLA's older emitters, where jaxlib still has them: in the
# tests of steps half of the rest.
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jaxlib").startswith("0.10."):
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
