"""Half of the toy's work, in a second module of the package ``clients``."""


def answer(server_round: int, partition: int) -> int:
    return 100 * server_round + partition
