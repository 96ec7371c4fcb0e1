"""Reader of a run's journal, for the trials in this folder."""

import struct


class Postcard:
    """Reader of the format in which the journal holds its entries."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def number(self):
        value = shift = 0
        while True:
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def raw(self, size):
        self.at += size
        return self.data[self.at - size : self.at]

    def f32(self):
        return struct.unpack("<f", self.raw(4))[0]

    def f64(self):
        return struct.unpack("<d", self.raw(8))[0]

    def text(self):
        return self.raw(self.number()).decode()

    def list(self, read):
        return [read() for _ in range(self.number())]

    def option(self, read):
        return read() if self.raw(1) == b"\1" else None

    def verdict(self):
        kind = self.number()
        return self.f64() if kind == 0 else (["abstention", "failure"][kind - 1], self.text())

    def rewarded(self):
        """Reads a group with its feedback and rewards."""
        group = {"seq": self.number(), "epoch": self.number(), "row": self.number(), "text": self.text()}
        group["prompt"] = self.list(self.number)
        self.list(self.number)
        self.option(self.text)

        def completion():
            read = {"ids": self.list(self.number), "logprobs": self.list(self.f32), "versions": self.list(self.number)}
            self.number()
            return read | {"text": self.text()}

        def preference():
            pair = (self.number(), self.number())
            return pair, self.verdict(), self.option(lambda: (self.f64(), self.f64()))

        def feedback():
            self.text(), self.number(), self.number()
            verdicts = self.list(self.verdict)
            preferences = self.list(preference)
            self.option(lambda: self.list(lambda: self.list(self.f32)))
            self.f64()
            return {"verdicts": verdicts, "preferences": preferences}

        group["completions"] = self.list(completion)
        group["feedback"] = self.option(feedback)
        group["scores"] = self.list(self.f64)
        self.list(self.f64)
        self.list(lambda: (self.number(), self.number(), self.f64()))
        self.list(lambda: self.list(self.f32))
        self.option(self.number)
        group["masked"] = self.option(self.text)
        self.number(), self.f64(), self.f64()
        return group


def steps(run):
    """Returns the number and the groups of each step of the run in the folder `run`, from its journal."""
    data, at, steps = (run / "journal.bin").read_bytes(), 0, []
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "little")
        body = Postcard(data[at + 8 : at + 8 + length])
        at += 8 + length
        if body.number() == 1:
            step = body.number()
            body.number()
            steps.append((step, body.list(body.rewarded)))
            assert body.at == length, f"step {step} of the journal has {length} bytes, and {body.at} were read"
    return steps
