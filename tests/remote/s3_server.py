"""Moto's S3 on loopback, with one bucket, driven by lines on stdin.

    put KEY PATH            stores a file
    fail STATUS COUNT       lets the next requests for objects fail
    seen                    prints how many GETs of objects there were since, and how many bytes they brought

Its first line has the address, and that of the same server over TLS. The folder named by its argument gets
`authority.pem`, the certificate to be trusted for that.
"""

import datetime
import ipaddress
import pathlib
import sys
import threading

import boto3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
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


def certificate(name, key, issuer, issuer_key, authority):
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder(
        subject_name=x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]),
        issuer_name=x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]),
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - datetime.timedelta(days=1),
        not_valid_after=now + datetime.timedelta(days=1),
    ).add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    if not authority:
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def certificates(folder):
    """An authority made for this run, and a server's certificate and key that it signed."""
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority, own, own_key = (folder / name for name in ("authority.pem", "own.pem", "key.pem"))
    authority.write_bytes(certificate("tests", authority_key, "tests", authority_key, True))
    own.write_bytes(certificate("localhost", key, "tests", authority_key, False))
    own_key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return str(own), str(own_key)


def serve(**options):
    server = make_server("127.0.0.1", 0, counted, threaded=True, request_handler=Quiet, **options)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port


own = certificates(pathlib.Path(sys.argv[1]))
url, secure = f"http://127.0.0.1:{serve()}", f"https://localhost:{serve(ssl_context=own)}"
s3 = boto3.client(
    "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="AKIATEST", aws_secret_access_key="s3cr3t"
)
s3.create_bucket(Bucket="models")
print(url, secure, flush=True)
for line in sys.stdin:
    words = line.split()
    if words[0] == "put":
        with open(words[2], "rb") as file:
            s3.put_object(Bucket="models", Key=words[1], Body=file.read(), ACL="public-read")
        print("done", flush=True)
    elif words[0] == "fail":
        with lock:
            faults.extend([int(words[1])] * int(words[2]))
        print("done", flush=True)
    elif words[0] == "seen":
        with lock:
            print(counts["requests"], counts["bytes"], flush=True)
            counts.update(requests=0, bytes=0)
