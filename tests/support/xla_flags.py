"""XLA's flags for tests, which compile far longer than they compute."""

from importlib.metadata import version

# Without optimizing compiled code, and with XLA's older emitters where there still are any: a quarter of the CPU time.
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jaxlib").startswith("0.10."):
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
