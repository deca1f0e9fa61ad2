"""A server on this machine that takes traces as LangSmith and OpenTelemetry collectors do, and keeps every byte."""

from __future__ import annotations

import gzip
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import zstandard
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from requests_toolbelt.multipart.decoder import MultipartDecoder


class Collector:
    """Runs by id with all their fields, spans by name, and the body of every request as it was before compression.

    Args:
        multipart: Whether /info announces multipart ingest; else clients send plain batches.
        zstd: Whether it announces compression.
    """

    def __init__(self, *, multipart=True, zstd=True):
        self.info = {
            "version": "0.11.0",
            "instance_flags": {"zstd_compression_enabled": zstd},
            "batch_ingest_config": {
                "use_multipart_endpoint": multipart,
                "scale_up_qsize_trigger": 1000,
                "scale_up_nthreads_limit": 2,
                "scale_down_nempty_trigger": 4,
                "size_limit": 100,
                "size_limit_bytes": 20_000_000,
            },
        }
        self.runs, self.spans, self.bodies, self.paths, self.encodings = {}, [], [], [], set()
        self.lock = threading.Lock()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(json.dumps(collector.info).encode())

            def do_POST(self):
                collector.take(self.path, dict(self.headers), self.body())
                self.answer(b"{}", 200 if self.path.endswith("/v1/traces") else 202)

            do_PATCH = do_POST

            def body(self):
                if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = []
                while size := int(self.rfile.readline().strip() or b"0", 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def answer(self, body, status=200):
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    @property
    def bytes(self):
        """All that was sent, with the addresses it was sent to."""
        return "\n".join(self.paths).encode() + b"".join(self.bodies)

    def take(self, path, headers, body):
        headers = {name.lower(): value for name, value in headers.items()}
        encoding = headers.get("content-encoding")
        if encoding == "zstd":
            body = zstandard.ZstdDecompressor().stream_reader(body).read()
        elif encoding == "gzip":
            body = gzip.decompress(body)
        with self.lock:
            self.encodings.add(encoding)
            self.paths.append(path)
            self.bodies.append(body)
            if path.endswith("/runs/multipart"):
                for part in MultipartDecoder(body, headers["content-type"]).parts:
                    name = part.headers[b"Content-Disposition"].decode().split('name="')[1].split('"')[0]
                    _, run_id, *field = name.split(".")
                    content = json.loads(part.content)
                    self.merge(run_id, {field[0]: content} if field else content)
            elif path.endswith("/runs/batch"):
                batch = json.loads(body)
                for run in [*(batch.get("post") or []), *(batch.get("patch") or [])]:
                    self.merge(run["id"], run)
            elif path.endswith("/v1/traces"):
                request = ExportTraceServiceRequest.FromString(body)
                for resource in request.resource_spans:
                    for scope in resource.scope_spans:
                        self.spans += scope.spans
            else:
                raise AssertionError(f"a client sent something to {path}")

    def merge(self, run_id, fields):
        # A patch leaves out or empties what it does not change.
        self.runs.setdefault(run_id, {}).update({key: value for key, value in fields.items() if value is not None})

    def wait_for(self, what, seconds=15):
        """Wait until what() holds of what has arrived."""
        until = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < until, f"only {sorted(run.get('name', '?') for run in self.runs.values())} arrived"
            time.sleep(0.02)

    def children(self, run_id=None):
        """The runs under one, or the roots, in the order they started."""
        with self.lock:  # a run is made before it is filled
            found = [run for run in self.runs.values() if "dotted_order" in run and (run.get("parent_run_id") or None) == run_id]
        return sorted(found, key=lambda run: run["dotted_order"])

    def tree(self, run_id=None):
        """Names and kinds of the runs, nested."""
        return [(run["name"], run["run_type"], self.tree(run["id"])) for run in self.children(run_id)]
