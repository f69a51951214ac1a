"""Where buckets are, vendor by vendor. boto3 is the judge of addresses and signatures."""

import time
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
from botocore.config import Config

from sdxl_worker.errors import RequestError
from sdxl_worker.outputs.bucket import Bucket, bucket_of_job, bucket_of_owner, locate
from sdxl_worker.settings import Settings

MONTH = time.strftime("%m-%y")
R2 = "0123456789abcdef" * 2
# The endpoint, BUCKET_NAME, where the bucket's name is put, and the region.
VENDORS = [
    # AWS: the bucket in the host.
    ("https://s3.eu-west-1.amazonaws.com", "pics", "in host", "eu-west-1"),
    ("https://s3.amazonaws.com/", "pics", "in host", "us-east-1"),
    ("https://pics.s3.eu-west-1.amazonaws.com", None, "as is", "eu-west-1"),
    ("https://pics.s3.eu-west-1.amazonaws.com", "pics", "as is", "eu-west-1"),
    ("https://pics.s3-us-west-2.amazonaws.com", None, "as is", "us-west-2"),
    ("https://pics.s3.amazonaws.com", None, "as is", "us-east-1"),
    ("https://s3.dualstack.eu-west-1.amazonaws.com", "pics", "in host", "eu-west-1"),
    ("https://s3.cn-north-1.amazonaws.com.cn", "pics", "in host", "cn-north-1"),
    # With a dot in its name, no certificate covers the host.
    ("https://s3.eu-west-1.amazonaws.com", "my.pics", "in path", "eu-west-1"),
    ("https://s3.eu-west-1.amazonaws.com/pics", None, "as is", "eu-west-1"),
    # Cloudflare R2
    (f"https://{R2}.r2.cloudflarestorage.com", "pics", "in path", "auto"),
    (f"https://{R2}.eu.r2.cloudflarestorage.com/pics", None, "as is", "auto"),
    (f"https://pics.{R2}.r2.cloudflarestorage.com", None, "as is", "auto"),
    # Backblaze B2
    ("https://s3.us-west-004.backblazeb2.com", "pics", "in path", "us-west-004"),
    ("https://pics.s3.us-west-004.backblazeb2.com", None, "as is", "us-west-004"),
    # Google Cloud Storage
    ("https://storage.googleapis.com", "my_pics", "in path", "auto"),
    ("https://pics.storage.googleapis.com", None, "as is", "auto"),
    # DigitalOcean
    ("https://nyc3.digitaloceanspaces.com", "pics", "in path", "nyc3"),
    ("https://pics.nyc3.digitaloceanspaces.com", None, "as is", "nyc3"),
    # Runpod's network volumes: the bucket is the volume's id, the region its data centre.
    ("https://s3api-eu-ro-1.runpod.io/", "ab12cd34ef", "in path", "EU-RO-1"),
    # Others, MinIO among them
    ("http://minio:9000", "pics", "in path", "us-east-1"),
    ("http://minio.local:9000", "minio", "in path", "us-east-1"),
    ("https://pictures.example.com", "pictures", "in path", "us-east-1"),
    ("https://pics.s3.eu-1.example.com", "pics", "as is", "eu-1"),
    ("http://10.0.0.5:9000/pics", None, "as is", "us-east-1"),
    ("https://s3.fr-par.scw.cloud", "pics", "in path", "fr-par"),
    ("https://s3.wasabisys.com", "pics", "in path", "us-east-1"),
    ("https://s3.eu-central-1.wasabisys.com", "pics", "in path", "eu-central-1"),
    ("https://pics.s3.gra.io.cloud.ovh.net", None, "as is", "gra"),
    ("https://x.supabase.co/storage/v1/s3", "pics", "in path", "us-east-1"),
    ("https://pics.oss-eu-central-1.aliyuncs.com", "pics", "as is", "us-east-1"),
]


@pytest.mark.parametrize(("endpoint", "name", "place", "region"), VENDORS)
def test_a_bucket_is_where_its_vendor_has_it(
    endpoint: str, name: str | None, place: str, region: str
) -> None:
    url = {
        "as is": endpoint.rstrip("/"),
        "in host": endpoint.rstrip("/").replace("://", f"://{name}."),
        "in path": f"{endpoint.rstrip('/')}/{name}",
    }[place]
    assert locate(endpoint, name, None)[:2] == (url, region)
    assert locate(endpoint, name, "mars-1")[1] == "mars-1", "what is told counts"


def client(endpoint: str, region: str, style: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=region,
        aws_access_key_id="AKIDEXAMPLE",
        aws_secret_access_key="hunter2",  # noqa: S106
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": style},
            request_checksum_calculation="when_required",
        ),
    )


@pytest.fixture
def _clock_that_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    import botocore.auth

    now = botocore.auth.get_current_datetime()
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda: now)


NAMED = [(endpoint, name) for endpoint, name, *_ in VENDORS if name and name not in endpoint]


@pytest.mark.usefixtures("_clock_that_stands")
@pytest.mark.parametrize(("endpoint", "name"), NAMED)
def test_requests_and_links_are_those_of_boto3(endpoint: str, name: str) -> None:
    url, region, _ = locate(endpoint, name, None)
    bucket = Bucket(url, region, "AKIDEXAMPLE", "hunter2", prefix="ä b/~c", expiry_seconds=77)
    style = "path" if urlsplit(url).path else "virtual"
    judge = client(endpoint, region, style)
    sent = []

    def keep(request: Any, **_: Any) -> Any:
        sent.append(request)
        raise InterruptedError

    judge.meta.events.register("before-send", keep)
    where = {"Bucket": name, "Key": "ä b/~c/job/1.png"}
    with pytest.raises(InterruptedError):
        judge.put_object(**where, Body=b"data", ContentType="image/png")
    address, headers = bucket.signed("PUT", "job/1.png", b"data", "image/png")
    assert address == sent[0].url
    theirs = {key.lower(): value for key, value in sent[0].headers.items()}
    for key in ("content-type", "x-amz-content-sha256", "x-amz-date"):
        value = theirs[key]
        assert {k.lower(): v for k, v in headers.items()}[key] == (
            value.decode() if isinstance(value, bytes) else value
        )
    assert not [name for name in headers if "checksum" in name.lower() or name == "Expect"]
    if bucket.has_signed_links:
        link = judge.generate_presigned_url("get_object", Params=where, ExpiresIn=77)
        assert bucket.link("job/1.png") == link
    else:
        assert bucket.link("job/1.png") == address, "Runpod's has no signed links"


class TestOldDeployments:
    """The three variables of 2.1.0: its objects were at ENDPOINT/MONTH/JOB/NAME, whatever of it is
    the bucket's name."""

    @pytest.mark.parametrize(
        "endpoint",
        [
            "https://pics.s3.eu-west-1.amazonaws.com",
            "https://pics.nyc3.digitaloceanspaces.com",
            "http://minio:9000/pics",
            "http://minio:9000",
            f"https://{R2}.r2.cloudflarestorage.com",
        ],
    )
    def test_objects_are_where_they_were(
        self, endpoint: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bucket = owners(monkeypatch, endpoint_url=endpoint)
        address, _ = bucket.signed("PUT", "job/1.png", b"")
        was = client(endpoint, bucket.region, "path").generate_presigned_url(
            "put_object", Params={"Bucket": MONTH, "Key": "job/1.png"}
        )
        assert address == was.partition("?")[0] == f"{endpoint}/{MONTH}/job/1.png"

    def test_a_prefix_or_a_name_ends_the_month_as_a_folder(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        host = "https://pics.s3.eu-west-1.amazonaws.com"
        bucket = owners(monkeypatch, endpoint_url=host, prefix="/sd/xl/")
        assert bucket.signed("PUT", "a", b"")[0] == f"{host}/sd/xl/a"
        bucket = owners(monkeypatch, endpoint_url=host, name="pics", prefix="")
        assert bucket.signed("PUT", "a", b"")[0] == f"{host}/a"


def owners(monkeypatch: pytest.MonkeyPatch, **settings: str) -> Bucket:
    given = {"access_key_id": "AKIDEXAMPLE", "secret_access_key": "hunter2", **settings}
    for name, value in given.items():
        monkeypatch.setenv(f"BUCKET_{name.upper()}", value)
    bucket = bucket_of_owner(Settings())
    assert bucket is not None
    return bucket


def test_links_lead_to_the_public_address_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = owners(
        monkeypatch,
        endpoint_url="http://minio:9000",
        name="pics",
        prefix="a b",
        public_url="https://cdn.example/x/",
    )
    assert bucket.link("job/1.png") == "https://cdn.example/x/a%20b/job/1.png"


def test_links_expire_when_the_owner_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET_URL_EXPIRY_SECONDS", "99")
    bucket = owners(monkeypatch, endpoint_url="http://minio:9000", name="pics", region="mars-1")
    assert "X-Amz-Expires=99" in bucket.link("a")
    assert "%2Fmars-1%2Fs3%2F" in bucket.link("a")


def test_without_an_endpoint_there_is_no_bucket() -> None:
    assert bucket_of_owner(Settings()) is None


CONFIG = {
    "accessId": "AKIDEXAMPLE",
    "accessSecret": "hunter2",
    "bucketName": "pics",
    "endpointUrl": "https://s3.eu-west-1.amazonaws.com",
}


def test_a_job_may_bring_its_bucket() -> None:
    bucket = bucket_of_job({**CONFIG, "anything": 1}, private_allowed=False)
    assert bucket.url == "https://pics.s3.eu-west-1.amazonaws.com"
    assert (bucket.region, bucket.prefix, bucket.private_allowed) == ("eu-west-1", "", False)
    assert "X-Amz-Expires=604800" in bucket.link("a")
    assert "hunter2" not in repr(bucket)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"accessId": None}, "wrong or missing: accessId"),
        ({"accessSecret": ["hunter2"]}, "wrong or missing: accessSecret"),
        ({"bucketName": "", "endpointUrl": 7}, "wrong or missing: bucketName, endpointUrl"),
        ({"endpointUrl": "s3.hunter2"}, "s3Config.endpointUrl: must be an http:// or https://"),
        ({"endpointUrl": "http://["}, "s3Config.endpointUrl: must be an http:// or https://"),
        ({"endpointUrl": "http://a/?hunter2"}, "s3Config.endpointUrl: must be an http://"),
    ],
)
def test_what_is_wrong_with_it_is_told_without_its_values(change: Any, told: str) -> None:
    with pytest.raises(RequestError) as caught:
        bucket_of_job({**CONFIG, **change}, private_allowed=False)
    assert told in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", ["hunter2", ["hunter2"], 7])
def test_a_bucket_that_is_no_object_is_told(config: object) -> None:
    with pytest.raises(
        RequestError, match=r"^s3Config: must be an object with accessId, "
    ) as caught:
        bucket_of_job(config, private_allowed=False)
    assert "hunter2" not in str(caught.value)


def test_a_hostile_name_of_a_bucket_stays_one_part_of_a_path() -> None:
    for name in ("../x", "a/../b?c#d", "evil.example/"):
        bucket = bucket_of_job({**CONFIG, "bucketName": name}, private_allowed=False)
        address = urlsplit(bucket.signed("PUT", "k", b"")[0])
        assert address.hostname == "s3.eu-west-1.amazonaws.com"
        assert address.path.count("/") == 2
        assert not address.query
