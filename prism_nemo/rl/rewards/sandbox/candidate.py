"""The program under examination, in a process of its own, and how the examiner reaches its functions and objects.

Runs inside of the sandbox, on both sides of a pipe: what crosses it is plain data (`plain.py`), and an object of the
program that is none stays where it is and is asked there. It must import nothing but the standard library.
"""

import builtins
import contextlib
import json
import operator
import os
import resource
import signal
import sys
import types

import plain

ERROR_CHARACTERS = 400
# Methods of an object that tests may use; `contains`, `eq` and arithmetic beside a plain value are left out on purpose:
# an object could answer "yes" to everything.
_UNARY = ("len", "iter", "next", "str", "repr", "bool")
_ITEMS = ("getitem", "setitem", "delitem")
_AMONG_OBJECTS = ("eq", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow")


class Ended(Exception):
    """The candidate's process has ended."""


class ProgramError(Exception):
    """What the program raised, if it is none of Python's own exceptions."""


class Unsupported(BaseException):
    """The tests need what cannot be done here: their fault, not the program's."""


def become(program, name, given, out, err, serve=None, keep=()):
    """In a forked process: run the program (and then `serve` its functions) as if nothing else had been there."""
    status = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for number, fd in enumerate((given, out, err)):
            os.dup2(fd, number)
        for fd in range(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0]):
            if fd not in keep:
                with contextlib.suppress(OSError):
                    os.close(fd)
        for fd, name_of_stream in enumerate(("stdin", "stdout", "stderr")):
            stream = os.fdopen(fd, "w" if fd else "r", encoding="utf-8", errors="replace", closefd=False)
            setattr(sys, name_of_stream, stream)
            setattr(sys, f"__{name_of_stream}__", stream)
        sys.path.insert(0, "")
        module = sys.modules[name] = types.ModuleType(name)
        exec(compile(program, "program.py", "exec"), module.__dict__)
        if serve is not None:
            serve(module)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            if "threading" in sys.modules:
                sys.modules["threading"]._shutdown()
            if "atexit" in sys.modules:
                sys.modules["atexit"]._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status & 255)


class Candidate:
    """The program in a process of its own, whose functions are called over a pipe."""

    def __init__(self, program):
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        nowhere = os.open("/dev/null", os.O_RDWR)
        self.process = os.fork()
        if self.process == 0:
            become(program, "program", nowhere, nowhere, nowhere, Server(requests, answers), (requests, answers))
        for fd in (requests, answers, nowhere):
            os.close(fd)
        self._reader = os.fdopen(self._answers, "r", encoding="utf-8", errors="replace")
        self._asked = False

    def ask(self, operation, *arguments, **named):
        """Do something in the candidate's process.

        Raises:
            Ended: If it has ended.
            Exception: What the program raised there.
        """
        if not self._asked:
            self._asked = True
            self._answer()  # comes once the program was run; raises what it raised
        request = [operation, plain.encode(list(arguments), self._name), plain.encode(named, self._name)]
        data = (json.dumps(request) + "\n").encode()
        try:
            while data:
                data = data[os.write(self._requests, data) :]
        except BrokenPipeError:
            raise Ended("the program's process has ended") from None
        answer = self._answer()
        for argument, after in zip(arguments, answer.get("arguments", ())):  # noqa: B905
            _update(argument, plain.decode(after, self._object))
        return plain.decode(answer["value"], self._object)

    def _answer(self):
        line = self._reader.readline()
        if not line.endswith("\n"):
            raise Ended("the program's process has ended")
        answer = json.loads(line)
        if "raised" in answer:
            name, message = answer["raised"]
            kind: type = getattr(builtins, str(name), object)
            usable = isinstance(kind, type) and issubclass(kind, Exception)
            raise kind(str(message)) if usable else ProgramError(f"{name}: {message}")
        return answer

    def _name(self, value):
        if isinstance(value, Remote):
            return {"object": value._number}
        raise Unsupported(f"the tests hand the program a {type(value).__name__}, which is not plain data")

    def _object(self, data):
        return Remote(self, int(data["object"]))

    def close(self):
        """End the process; False if it cannot be."""
        with contextlib.suppress(OSError):
            os.close(self._requests)
        try:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        except PermissionError:
            return False
        except (ProcessLookupError, ChildProcessError):
            pass
        return True


def _update(argument, after):
    """Functions may change lists and dicts that they are given."""
    if isinstance(argument, list) and isinstance(after, list):
        argument[:] = after
    elif isinstance(argument, (dict, set)) and isinstance(after, type(argument)):
        argument.clear()
        argument.update(after)


class Server:
    """In the candidate's process: does what is asked over the pipe."""

    def __init__(self, requests, answers):
        self._requests, self._answers, self._objects = requests, answers, []

    def __call__(self, module):
        with open(self._requests, encoding="utf-8") as requests, open(self._answers, "w", encoding="utf-8") as answers:
            self._module = module
            self._tell(answers, {"value": None})
            for line in requests:
                self._tell(answers, self._do(*json.loads(line)))

    def _tell(self, answers, answer):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    def _do(self, operation, arguments, named):
        try:
            arguments = plain.decode(arguments, self._named_object)
            value = getattr(self, "_" + operation)(*arguments, **plain.decode(named, self._named_object))
            answer = {"value": plain.encode(value, self._number_of)}
            if operation in ("call", "function"):
                answer["arguments"] = [plain.encode(a, self._number_of) for a in arguments]
            return answer
        except Exception as error:
            known = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
            return {"raised": [known, str(error)[:ERROR_CHARACTERS]]}

    def _number_of(self, value):
        self._objects.append(value)
        return {"object": len(self._objects) - 1}

    def _named_object(self, data):
        return self._objects[data["object"]]

    def _name(self, path):
        first, *rest = path.replace("()", "").split(".")
        try:
            value = self._module.__dict__[first]
        except KeyError:
            raise NameError(f"name '{first}' is not defined") from None
        for name in rest:
            value = getattr(value() if isinstance(value, type) else value, name)
        return value

    def _function(self, path, *arguments):
        return self._name(path)(*arguments)

    def _call(self, value, *arguments, **named):
        return value(*arguments, **named)

    def _attribute(self, value, name):
        return getattr(value, name)

    def _operate(self, name, *values):
        return getattr(builtins if name in _UNARY else operator, name)(*values)


class Remote:
    """An object of the program that is not plain data; what is done to it is done there."""

    def __init__(self, candidate, number):
        self._candidate, self._number = candidate, number

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._candidate.ask("attribute", self, name)

    def __call__(self, *arguments, **named):
        return self._candidate.ask("call", self, *arguments, **named)

    __hash__ = object.__hash__


def _operation(name, among_objects):
    def method(self, *others):
        if among_objects and not isinstance(others[0], Remote):
            return NotImplemented
        return self._candidate.ask("operate", name, self, *others)

    return method


for _operator in (*_UNARY, *_ITEMS, *_AMONG_OBJECTS):
    setattr(Remote, f"__{_operator}__", _operation(_operator, _operator in _AMONG_OBJECTS))
