"""A bucket of S3-compatible storage: where it is, and requests to it with their signatures.

botocore signs (SigV4, no checksum headers, which Backblaze, Cloudflare and Google refuse). Its
client does not send: it follows redirects, cannot be stopped, and connects wherever a host's name
leads, while a job may bring a bucket of its own.
"""

import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

from pydantic import TypeAdapter

from sdxl_worker.errors import RequestError
from sdxl_worker.inputs import connections
from sdxl_worker.settings import MAX_URL_EXPIRY_SECONDS, HttpUrl, Settings

DEFAULT_REGION = "us-east-1"
# Hosts that tell the region, and perhaps the bucket; with the region where it is the same for all.
HOSTS = (
    (r"((?P<bucket>.+)\.)?s3[.-](dualstack\.)?((?P<region>[\w-]+)\.)?amazonaws\.com(\.cn)?", ""),
    (r"((?P<bucket>.+)\.)?\w{32}(\.\w+)?\.r2\.cloudflarestorage\.com", "auto"),
    (r"((?P<bucket>.+)\.)?storage\.googleapis\.com", "auto"),
    (r"((?P<bucket>.+)\.)?(?P<region>\w+)\.digitaloceanspaces\.com", ""),
    (
        r"((?P<bucket>.+)\.)?s3\.(?P<region>[\w-]+)\.(backblazeb2\.com|wasabisys\.com|scw\.cloud)",
        "",
    ),
    (r"(?P<bucket>.+)\.s3\.(?P<region>[\w-]+)\..+\..+", ""),  # as the SDK reads any host
)
AWS = re.compile(r"s3[.-].*amazonaws\.com(\.cn)?")
# The storage of Runpod's network volumes: the region is the data centre, and there are no signed
# links. https://docs.runpod.io/storage/s3-api
RUNPOD = re.compile(r"s3api-(?P<region>[\w-]+)\.runpod\.io")
CONFIG = ("accessId", "accessSecret", "bucketName", "endpointUrl")


@dataclass(frozen=True)
class Bucket:
    url: str
    """Where its objects' addresses begin, without a slash at the end."""
    region: str
    access_key_id: str
    secret_access_key: str = field(repr=False)
    prefix: str = ""
    public_url: str | None = None
    expiry_seconds: int = MAX_URL_EXPIRY_SECONDS
    private_allowed: bool = False
    """Whether it may have a private address. That of the worker's owner may."""

    def key(self, name: str) -> str:
        """Quoted, as it is in addresses."""
        return quote("/".join(part for part in (self.prefix.strip("/"), name) if part), safe="/~")

    def signed(
        self, method: str, name: str, data: bytes = b"", media_type: str | None = None
    ) -> tuple[str, dict[str, str]]:
        """The address and the headers of a request for an object. They are valid for minutes."""
        headers = {"Content-Type": media_type} if media_type else {}
        request = self._sign("S3SigV4Auth", method, self.key(name), headers, data)
        return request.url, dict(request.headers)

    def link(self, name: str) -> str:
        """For everyone, where the storage has such links: at the public address, or signed."""
        if self.public_url:
            return f"{self.public_url.rstrip('/')}/{self.key(name)}"
        if not self.has_signed_links:
            return f"{self.url}/{self.key(name)}"
        request = self._sign("S3SigV4QueryAuth", "GET", self.key(name), expires=self.expiry_seconds)
        return str(request.url)

    @property
    def has_signed_links(self) -> bool:
        return RUNPOD.fullmatch(urlsplit(self.url).hostname or "") is None

    def _sign(
        self,
        signer: str,
        method: str,
        key: str,
        headers: Mapping[str, str] | None = None,
        data: bytes = b"",
        **options: Any,
    ) -> Any:
        # It takes a tenth of a second to import, which a start need not.
        from botocore import auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials

        logging.getLogger("botocore").setLevel(logging.INFO)  # at DEBUG it logs signatures
        credentials = Credentials(self.access_key_id, self.secret_access_key)
        request = AWSRequest(method, f"{self.url}/{key}", headers, data)
        getattr(auth, signer)(credentials, "s3", self.region, **options).add_auth(request)
        return request


def bucket_of_owner(settings: Settings) -> Bucket | None:
    """The bucket of the environment. The settings have all of it, or nothing."""
    endpoint_url, secret = settings.bucket_endpoint_url, settings.bucket_secret_access_key
    if endpoint_url is None or secret is None:
        return None
    url, region, old_prefix = locate(endpoint_url, settings.bucket_name, settings.bucket_region)
    return Bucket(
        url,
        region,
        settings.bucket_access_key_id or "",
        secret.get_secret_value(),
        old_prefix if settings.bucket_prefix is None else settings.bucket_prefix,
        settings.bucket_public_url,
        settings.bucket_url_expiry_seconds,
        private_allowed=True,
    )


def bucket_of_job(config: object, *, private_allowed: bool) -> Bucket:
    """The bucket of `s3Config`, which stands beside a job's `input`.

    Raises:
        RequestError: with what is wrong, but not the values: there are secrets among them.
    """
    given = config if isinstance(config, Mapping) else {}
    wrong = [name for name in CONFIG if not _is_text(given.get(name))]
    region = given.get("region") or None
    if region is not None and not _is_text(region):
        wrong.append("region")
    if wrong:
        raise RequestError(
            f"s3Config: must be an object with {', '.join(CONFIG)} and, if need be, region, each a "
            f"string that is not empty; wrong or missing: {', '.join(wrong)}"
        )
    try:
        TypeAdapter(HttpUrl).validate_python(given["endpointUrl"])
    except ValueError:
        raise RequestError(
            "s3Config.endpointUrl: must be an http:// or https:// address, without a query"
        ) from None
    if not private_allowed and connections.is_private(given["endpointUrl"]):
        raise RequestError(f"s3Config.endpointUrl: {connections.PUBLIC_ONLY}")
    url, region, _ = locate(given["endpointUrl"], given["bucketName"], region)
    return Bucket(
        url,
        region,
        given["accessId"],
        given["accessSecret"],
        private_allowed=private_allowed,
    )


def _is_text(value: object) -> bool:
    """Not empty, and without half a character, which JSON can carry."""
    return isinstance(value, str) and value.encode("utf-8", "ignore").decode() == value != ""


def locate(endpoint_url: str, name: str | None, region: str | None) -> tuple[str, str, str]:
    """
    Args:
        endpoint_url: may have the bucket in its host or in its path.
        name: the bucket's, if it is told.
        region: that of the signatures, if it is told.

    Returns:
        The bucket's address, the region, and the prefix that 2.1.0 gave its objects there.
    """
    endpoint = endpoint_url.rstrip("/")
    parts = urlsplit(endpoint)
    host = (parts.hostname or "").lower()
    bucket_in_host, region_in_host = _read(host)
    region = region or region_in_host or DEFAULT_REGION
    if name is None:
        # 2.1.0 named the bucket after the month, and with a bucket in the address it was a folder.
        month = time.strftime("%m-%y")
        if bucket_in_host or parts.path:
            return endpoint, region, month
        name = month
    # A host that nothing is known of may be called the same by chance, as minio.local.
    is_named_so = host.startswith(f"{name.lower()}.") and host.count(".") > 2
    in_host = bucket_in_host == name.lower() or (bucket_in_host is None and is_named_so)
    is_there = in_host or parts.path.endswith(f"/{name}")
    if is_there:
        return endpoint, region, ""
    # AWS asks for the bucket in the host; all others take it in the path, some only there. With a
    # dot in it, a certificate would not cover the host.
    if AWS.fullmatch(host) and re.fullmatch(r"[a-z0-9-]+", name) and not parts.path:
        return f"{parts.scheme}://{name}.{parts.netloc}", region, ""
    return f"{endpoint}/{quote(name, safe='')}", region, ""


def _read(host: str) -> tuple[str | None, str | None]:
    """The bucket and the region that a host's name tells."""
    if match := RUNPOD.fullmatch(host):
        return None, match["region"].upper()
    for pattern, region in HOSTS:
        if match := re.fullmatch(pattern, host):
            found = match.groupdict()
            return found.get("bucket"), region or found.get("region")
    return None, None
