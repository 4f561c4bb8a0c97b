"""A judge behind a server of fixed delay: 16 requests at a time against one at a time.

Run from the project's root:

    .venv/bin/python benchmarks/judge.py
"""

import argparse
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from common import alternate, write_results

from prefopt_trl import JudgeRanker

ANSWER = json.dumps({"choices": [{"message": {"role": "assistant", "content": "Comparison: equal.\nPreferred: A"}}]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=0.2, help="Seconds that the server takes for an answer.")
    parser.add_argument("--comparisons", type=int, default=64, help="Comparisons, of two requests each.")
    parser.add_argument("--concurrency", type=int, default=16, help="Requests at a time.")
    parser.add_argument("--rounds", type=int, default=3, help="Rounds counted, after one that is not.")
    args = parser.parse_args()

    class Server(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(args.delay)
            self.send_response(200)
            self.send_header("Content-Length", str(len(ANSWER)))
            self.end_headers()
            self.wfile.write(ANSWER.encode())

        def log_message(self, format: str, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    prompts = [f"question {number}" for number in range(args.comparisons)]

    def judge(concurrency: int) -> None:
        ranker = JudgeRanker(
            "judge", base_url=f"http://127.0.0.1:{server.server_port}/v1", votes=2, concurrency=concurrency
        )
        ranker.compare(prompts, ["yes"] * len(prompts), ["no"] * len(prompts))

    result = alternate(lambda: judge(args.concurrency), lambda: judge(1), args.rounds)
    print(json.dumps(result, indent=2))
    print("written to", write_results("judge", vars(args), result))


if __name__ == "__main__":
    main()
