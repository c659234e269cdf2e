"""Moto's S3 on loopback, with one bucket, driven by lines on stdin.

    put KEY PATH            stores a file
    fail STATUS COUNT       lets the next requests for objects fail
    seen                    prints how many GETs of objects there were since, and how many bytes they brought
"""

import sys
import threading

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

lock = threading.Lock()
counts = {"requests": 0, "bytes": 0}
faults = []
application = DomainDispatcherApplication(create_backend_app)


def counted(environ, start_response):
    if environ["REQUEST_METHOD"] != "GET" or environ["PATH_INFO"].count("/") < 2:
        return application(environ, start_response)
    with lock:
        counts["requests"] += 1
        fault = faults.pop(0) if faults else None
    if fault:
        body = b"<Error><Code>SlowDown</Code></Error>"
        start_response(f"{fault} No", [("Content-Length", str(len(body)))])
        return [body]
    body = b"".join(application(environ, start_response))
    with lock:
        counts["bytes"] += len(body)
    return [body]


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_):
        pass


server = make_server("127.0.0.1", 0, counted, threaded=True, request_handler=Quiet)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}"
s3 = boto3.client(
    "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="AKIATEST", aws_secret_access_key="s3cr3t"
)
s3.create_bucket(Bucket="models")
print(url, flush=True)
for line in sys.stdin:
    words = line.split()
    if words[0] == "put":
        with open(words[2], "rb") as file:
            s3.put_object(Bucket="models", Key=words[1], Body=file.read())
        print("done", flush=True)
    elif words[0] == "fail":
        with lock:
            faults.extend([int(words[1])] * int(words[2]))
        print("done", flush=True)
    elif words[0] == "seen":
        with lock:
            print(counts["requests"], counts["bytes"], flush=True)
            counts.update(requests=0, bytes=0)
server.shutdown()
