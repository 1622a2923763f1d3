"""Prints the command line that a run would record."""

from kd_jax.trainer.run_directory import command_line

if __name__ == "__main__":
    print(command_line())
