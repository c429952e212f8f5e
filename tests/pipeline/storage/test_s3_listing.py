"""Listings of S3 read here say what botocore's own parser says."""

from __future__ import annotations

from typing import Any

import botocore.session
import pytest
from botocore.parsers import create_parser
from botocore.utils import parse_timestamp

from pipeline.storage.s3_listing import parse_time, take_objects

_PAGE = """<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult{namespace}><Name>b</Name><Prefix>r/</Prefix><EncodingType>url</EncodingType>
<IsTruncated>true</IsTruncated><KeyCount>3</KeyCount>
<Contents><Key>r/a%20&amp;b.json</Key><LastModified>2026-01-31T12:00:00.250Z</LastModified>
<ETag>&quot;0cc1&quot;</ETag><Size>12</Size><StorageClass>STANDARD</StorageClass></Contents>
<Contents><Size>0</Size><Key>r/ünï</Key><ETag>"1"</ETag>
<LastModified>Sat, 31 Jan 2026 12:00:00 GMT</LastModified>
<Owner><ID>x</ID><DisplayName>y</DisplayName></Owner></Contents>
<CommonPrefixes><Prefix>r/d/</Prefix></CommonPrefixes>
<Contents><Key>r/z</Key><Size>5368709121</Size></Contents>
<NextContinuationToken>t&lt;1</NextContinuationToken></ListBucketResult>"""


def parsed(body: str, *, quickly: bool, status: int = 200) -> dict[str, Any]:
    model = botocore.session.get_session().get_service_model("s3")
    shape = model.operation_model("ListObjectsV2").output_shape
    response: dict[str, Any] = {"status_code": status, "headers": {}, "body": body.encode()}
    more: dict[str, Any] = {}
    if quickly:
        take_objects(response_dict=response, customized_response_dict=more, operation_model=None)
    found: dict[str, Any] = create_parser("rest-xml").parse(response, shape)
    return found | more


@pytest.mark.parametrize("namespace", ["", ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'])
def test_a_page_says_the_same(namespace: str) -> None:
    page = _PAGE.format(namespace=namespace)
    quick, expected = parsed(page, quickly=True), parsed(page, quickly=False)
    for one in expected["Contents"]:
        one.pop("Owner", None)  # which is not used
    assert quick == expected
    assert len(quick["Contents"]) == 3


def test_an_empty_page_and_an_error_are_left_to_botocore() -> None:
    empty = _PAGE[: _PAGE.index("<Contents>")].format(namespace="") + "</ListBucketResult>"
    error = "<Error><Code>NoSuchBucket</Code><Message>none</Message></Error>"
    for body, status in ((empty, 200), (error, 404)):
        quick = parsed(body, quickly=True, status=status)
        assert quick == parsed(body, quickly=False, status=status)


@pytest.mark.parametrize(
    "given",
    [
        "2026-01-31T12:00:00.250Z",
        "2026-01-31T12:00:00Z",
        "Sat, 31 Jan 2026 12:00:00 GMT",
        "Saturday, 31-Jan-26 12:00:00 GMT",
        "2026-01-31T12:00:00+01:00",
        1769860800,
    ],
)
def test_times_are_those_of_botocore(given: str | int) -> None:
    assert parse_time(given) == parse_timestamp(given)
