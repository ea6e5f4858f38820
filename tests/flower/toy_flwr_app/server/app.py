"""A server that asks every client for a number, round by round, and writes down what it got."""

import json
import os
import sys
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


def ask(grid: Grid, nodes: list[int], server_round: int) -> list[dict]:
    task = ConfigRecord({"round": server_round})
    messages = [Message(RecordDict({"task": task}), dst_node_id=node, message_type="train") for node in nodes]
    replies = []
    for reply in grid.send_and_receive(messages):
        if reply.has_error():
            raise RuntimeError(f"a client failed: {reply.error.reason}")
        where = json.loads(str(reply.content["where"]["json"]))
        replies.append({"value": reply.content["answer"]["value"], **where})
    return sorted(replies, key=lambda reply: reply["value"])


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    print("toy server starts")
    if config["fail"] == "server":
        raise ValueError("the toy server fails as told: \u00fc, 100 %")
    if config["fail"] == "die":
        os.kill(os.getpid(), 9)
    while len(nodes := sorted(grid.get_node_ids())) < 2:
        time.sleep(0.1)
    result = {
        "message": config["message"],
        "scenario": (Path(__file__).parents[1] / "scenarios" / "toy.yaml").read_text(),
        "file": __file__,
        "pid": os.getpid(),
        "python": sys.prefix,
        "cwd": os.getcwd(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith("TOY_")},
        "rounds": [],
    }
    for server_round in range(1, int(config["rounds"]) + 1):
        result["rounds"].append(ask(grid, nodes, server_round))
        draft = Path(str(config["out"]) + ".draft")
        draft.write_text(json.dumps(result))
        draft.replace(str(config["out"]))
        time.sleep(float(config["pause"]))
