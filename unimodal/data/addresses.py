"""The bytes behind an address: of the web, within limits of time and size, or of a data URL, which holds them itself."""

import base64
import binascii
import urllib.error
import urllib.request
from urllib.parse import unquote_to_bytes

from unimodal.data.decoding import ImageError
from unimodal.data.endings import is_data, shown

MAX_BYTES = 64 * 2**20  # of a download
TIMEOUT = 20.0  # seconds without an answer

# urllib's default opener would also follow a redirect to ftp; this one knows the web only.
_WEB = urllib.request.OpenerDirector()
for _handler in (
    urllib.request.ProxyHandler,
    urllib.request.HTTPHandler,
    urllib.request.HTTPSHandler,
    urllib.request.HTTPRedirectHandler,
    urllib.request.HTTPErrorProcessor,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.UnknownHandler,
):
    _WEB.add_handler(_handler())


def fetched(address: str, timeout: float) -> bytes:
    """What lies behind a data URL, or an http or https one.

    Raises:
        ImageError: another kind of address, a malformed data URL, a download that fails or is too large.
    """
    return _unpacked(address) if is_data(address) else _downloaded(address, timeout)


def _unpacked(address: str) -> bytes:
    """The bytes in a data URL of a picture, in base64 or percent-encoded (RFC 2397)."""
    head, comma, content = address[len("data:") :].partition(",")
    name = f"the data URL {shown(address)}"
    kind, *settings = head.lower().split(";")
    if not comma:
        raise ImageError(f"{name} has no comma between its head and its content; expected data:image/png;base64,...")
    if not kind.startswith("image/"):
        raise ImageError(
            f"{name} is of the type {kind or 'text/plain'!r}; expected a picture: data:image/png;base64,..."
        )
    data = unquote_to_bytes(content)
    if "base64" in (setting.strip() for setting in settings):
        data = b"".join(data.split())
        try:
            data = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)  # as browsers do without the padding
        except binascii.Error as error:
            raise ImageError(f"{name} is no base64: {error}; encode the file's bytes again") from None
    if not data:
        raise ImageError(f"{name} is empty; expected the bytes of a picture after the comma")
    return data


def _downloaded(url: str, timeout: float) -> bytes:
    if not url.lower().startswith(("http://", "https://")):
        raise ImageError(f"{shown(url)} is neither http nor https; download it yourself and pass the file")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "unimodal"})
        with _WEB.open(request, timeout=timeout) as response:
            data: bytes = response.read(MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        raise ImageError(
            f"the server of {shown(url)} answered {error.code} {error.reason}; check the address"
        ) from error
    except Exception as error:  # urllib, http.client and ssl raise kinds of their own; none of them says which address
        raise ImageError(f"{shown(url)} could not be fetched: {error}; check the address and the network") from error
    if len(data) > MAX_BYTES:
        raise ImageError(f"{shown(url)} is larger than {MAX_BYTES} bytes; download it yourself and pass the file")
    return data
