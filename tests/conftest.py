"""Settings for all tests."""

from hypothesis import settings

# The same examples on every machine and in every run, however slow the machine is.
settings.register_profile("folovllm", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("folovllm")
