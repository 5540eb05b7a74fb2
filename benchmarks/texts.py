"""Fixed texts for the parity benchmark: Chinese, English and code, written for it.

No model has been trained on them. Each is longer than 500 tokens, since short prompts miss faults
of the rotary embedding; the questions are short, and answered in more than 64 tokens.
"""

QUESTIONS = {
    "Chinese": "请用几句话介绍一下长城的历史。",
    "English": "Explain step by step how a bicycle stays upright.",
    "code": "Write a Python function that merges two sorted lists, and explain it.",
}

CHINESE = """\
山脚下有一个小镇，镇子不大，一条石板路从东头走到西头，不过一顿饭的工夫。路的两旁开着米店、布店、
药铺和一家旧书店。书店的主人姓沈，六十多岁，戴一副圆眼镜，说话很慢，仿佛每个字都要先在心里称一称
重量。镇上的孩子放学以后常常跑到他那里去看书，他从来不赶人，只是提醒大家翻书以前先把手洗干净。
有一年冬天，雪下得特别大，通往县城的公路断了整整十天。邮局没有信，商店没有新货，连电灯也是时明
时暗。到了晚上，人们无事可做，便三三两两地聚到书店里来。沈先生在屋子中间生了一个火炉，炉上煮着
茶，谁来了都可以倒一碗。起初大家只是谈天气、谈收成、谈谁家的屋顶被雪压坏了，后来有人提议，不如
请沈先生讲一段书。他推辞了几句，终于从架子上取下一本没有封面的旧书，借着火光念了起来。
那本书讲的是一个年轻的水手。他出海的时候才十七岁，船在南方的海上遇到大风，漂到了一座没有名字的
岛。岛上的人不识字，却能记住三百年以来每一次涨潮的时间，因为他们把这些数字编成了歌，母亲教给女儿，
女儿再教给自己的孩子。水手学会了这些歌，并且发现其中有一处差错：按照歌里的算法，下一次大潮会晚
来两天。他把自己的计算告诉了岛上最年长的妇人。老妇人听完以后没有生气，也没有马上相信，只是说：
“既然你说歌错了，那么我们就到海边去等，海从来不会说谎。”
念到这里，炉子里的火渐渐小了，沈先生合上书说，剩下的明天再讲。孩子们都不肯走，追着问潮水到底是
哪一天来的，歌究竟有没有错。沈先生笑着摇头。第二天晚上，来的人比前一天多了一倍，连平时最不爱出门
的老铁匠也搬来一张小凳子，坐在门边。就这样，十个夜晚过去了，书还没有讲完，路却已经通了。邮车开进
镇子的那天早晨，很多人站在街上看，心里竟然有一点舍不得。后来镇上的人说起那场大雪，很少提到寒冷和
不便，说得最多的，总是那间小小的书店、那炉火，还有那首算错了两天的歌。
"""

ENGLISH = """\
The lighthouse at the end of the long spit had been without a keeper for eleven years when the
harbour board decided to sell it. Nobody expected an offer. The road to it was covered twice a day
by the tide, the roof leaked over the stairs, and the lamp itself had long since been replaced by a
small automatic beacon on a steel post. The advertisement nevertheless brought one letter, written
in green ink by a retired teacher of geography named Margaret Oakes, who asked only two questions:
whether the walls were dry below the second floor, and whether the old record books were still
there. The answer to the first was no, and to the second yes, so she bought it.

What she wanted were the books. For a hundred and thirty years each keeper had written down, every
four hours, the direction of the wind, the height of the water against a painted scale, and the
ships that could be seen. Taken one by one the entries were dull, and most of them were hard to
read. Taken together they were one of the longest unbroken series of measurements on that coast,
and nobody had ever copied them. Margaret set up a table in the only dry room, bought a strong lamp
and began with the first page. She copied forty entries before breakfast and forty after supper,
and in the hours between she repaired the stairs.

In the second winter she noticed something odd. About once in nineteen years the water stood higher
than the wind could explain, always in the same two weeks of March, and always by nearly the same
amount. The keepers had noticed it as well. One had drawn a small fish in the margin, another had
written that the sea was paying a visit, and a third, evidently a careful man, had measured the
scale again to be certain that it had not sunk into the mud. None of them had stayed long enough to
see it happen twice. Margaret wrote to a university, received a polite reply, and wrote again with
a table of all the dates. This time two young scientists came out at low tide, missed the moment to
go back, and had to spend the night on the floor beside the books. By the morning they had stopped
being polite and had started to argue, which she took as an excellent sign.
Before they left they asked how long she meant to stay, and she answered that there were still a
hundred and four years to copy.
"""

CODE = '''\
import heapq
from collections import defaultdict
from dataclasses import dataclass, field


@dataclass(order=True)
class Job:
    """One piece of work that waits for a worker."""

    due: float
    name: str = field(compare=False)
    cost: int = field(compare=False, default=1)
    needs: tuple[str, ...] = field(compare=False, default=())


class Scheduler:
    """Hands out jobs by due time, and none before everything that it needs is finished."""

    def __init__(self, workers: int):
        if workers < 1:
            raise ValueError(f"expected at least one worker, got {workers}")
        self.workers = workers
        self.ready: list[Job] = []
        self.waiting: dict[str, set[str]] = {}
        self.blocked_by: dict[str, list[Job]] = defaultdict(list)
        self.finished: set[str] = set()

    def add(self, job: Job) -> None:
        missing = {name for name in job.needs if name not in self.finished}
        if not missing:
            heapq.heappush(self.ready, job)
            return
        self.waiting[job.name] = missing
        for name in missing:
            self.blocked_by[name].append(job)

    def finish(self, name: str) -> list[str]:
        """Marks a job as finished and returns the names of the jobs that this set free."""
        self.finished.add(name)
        freed = []
        for job in self.blocked_by.pop(name, []):
            missing = self.waiting[job.name]
            missing.discard(name)
            if not missing:
                del self.waiting[job.name]
                heapq.heappush(self.ready, job)
                freed.append(job.name)
        return freed

    def run(self) -> float:
        """Simulates all jobs and returns the time at which the last one ends."""
        now = 0.0
        running: list[tuple[float, str]] = []
        while self.ready or running:
            while self.ready and len(running) < self.workers:
                job = heapq.heappop(self.ready)
                heapq.heappush(running, (now + job.cost, job.name))
            now, name = heapq.heappop(running)
            self.finish(name)
        if self.waiting:
            raise RuntimeError(f"these jobs wait for each other: {sorted(self.waiting)}")
        return now
'''

TEXTS = {"Chinese": CHINESE, "English": ENGLISH, "code": CODE}
