"""kd_jax: on which text should a student be distilled?"""

__version__ = "0.1.0"
