"""CSV files of data sets, row by row."""

import csv
import io
from collections.abc import Iterator

from evatok.artifacts import Location
from evatok.errors import UserError


def rows(uri: str, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """The rows of a CSV with a header, reading as it goes; missing values are "".

    Raises UserError when the file is not there, lacks one of `columns` or is no CSV.
    """
    location = Location.parse(uri)
    try:
        stream = location.fs.open_input_stream(location.path)
    except (FileNotFoundError, OSError) as error:
        raise UserError(f"{uri}: cannot be read ({error}).") from None
    with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="") as text:
        reader = csv.DictReader(text, restval="")
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise UserError(
                f"{uri}: no column {', '.join(missing)}; found {', '.join(reader.fieldnames or ())}."
            )
        try:
            yield from reader
        except csv.Error as error:
            raise UserError(f"{uri}: line {reader.line_num} is not CSV ({error}).") from None
