"""temporary"""


def read_record(directory):
    return {}
