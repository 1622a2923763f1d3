"""XLA's flags for tests, which compile far longer than they compute."""

# Without optimizing compiled code, and with XLA's older emitters: a quarter of the default's CPU time.
FAST_COMPILATION = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)
