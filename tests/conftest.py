"""What holds for all tests."""

import signal


def pytest_configure() -> None:
    """Take Ctrl-C and hang-ups back where a shell started the tests in the background: processes inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
