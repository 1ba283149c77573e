# The conftest.py beside this may be imported before pytest is configured, and with it Triton.
from tests.support import device  # noqa: F401
