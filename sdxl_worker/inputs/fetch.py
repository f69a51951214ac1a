"""An address, or a data URI, becomes bytes. Only public addresses are fetched."""

import base64
import binascii

from sdxl_worker.errors import RequestError

MAX_DOWNLOAD_BYTES = 50 * 1024**2
FETCH_TIMEOUT_SECONDS = 20


def fetch(address: str, field: str) -> bytes:
    """
    Args:
        address: http://, https:// or data:, as the request's rules allow.
        field: the place of `address` in the request, for messages.

    Raises:
        RequestError: nothing can be fetched from there.
    """
    if address[:5].lower() == "data:":
        return _decoded_data_uri(address, field)
    return _fetched(address, field)


def _decoded_data_uri(uri: str, field: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not (header.lower().endswith(";base64") and comma):
        raise RequestError(
            f"{field}: a data URI must read data:image/png;base64, (or another picture type) "
            "and then the picture in base64"
        )
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(f"{field}: what follows base64, is not valid base64") from None


def _fetched(url: str, field: str) -> bytes:
    # The SDK's fetcher connects to public addresses only, whatever the name resolves to and
    # wherever a redirect leads. It is imported here because runpod takes a second or two.
    import requests
    from runpod.serverless.utils import rp_ssrf

    try:
        with rp_ssrf.safe_get(
            url, timeout=FETCH_TIMEOUT_SECONDS, max_bytes=MAX_DOWNLOAD_BYTES
        ) as response:
            if response.status_code != requests.codes.ok:
                raise RequestError(
                    f"{field}: its server answered {response.status_code} {response.reason}"
                )
            chunks = rp_ssrf.iter_content_capped(response, 1024**2, MAX_DOWNLOAD_BYTES)
            return b"".join(chunks)
    except rp_ssrf.SSRFError as error:
        raise RequestError(f"{field}: the worker does not fetch this: {error}") from None
    except requests.Timeout:
        raise RequestError(
            f"{field}: its server did not answer within {FETCH_TIMEOUT_SECONDS} seconds"
        ) from None
    except (requests.RequestException, ValueError, OSError) as error:
        raise RequestError(
            f"{field}: could not be fetched ({type(error).__name__}); is the address right?"
        ) from None
