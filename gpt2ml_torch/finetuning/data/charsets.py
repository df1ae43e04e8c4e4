"""Guess the encoding of a file that is not UTF-8, and say how to convert it."""

from __future__ import annotations

import codecs
from typing import NamedTuple

_MAGIC = {
    b"\x1f\x8b": "gzip: name it .gz",
    b"\x28\xb5\x2f\xfd": "zstd: name it .zst",
    b"\xfd7zXZ\x00": "xz: name it .xz",
    b"BZh": "bzip2: unpack it with bunzip2",
    b"7z\xbc\xaf": "a 7-Zip archive: unpack it",
    b"Rar!": "a RAR archive: unpack it",
    b"PK\x03\x04": "a zip archive (or .docx, .xlsx): unpack or export it as text",
    b"\xd0\xcf\x11\xe0": "an old Word or Excel file: export it as text in UTF-8",
    b"%PDF": "a PDF: export it as text",
    b"PAR1": "Parquet: export it as JSON Lines",
    b"SQLite format 3": "an SQLite database: export it as JSON Lines",
    b"\x89HDF": "HDF5: export it as JSON Lines",
    b"\x93NUMPY": "a NumPy array of numbers: expected the text they were made from",
}
_MARKS = {  # longest first: the mark of UTF-16 begins another
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"\x84\x31\x95\x33": "GB18030",
}
_PUNCTUATION = frozenset("，。、；：？！「」『』“”‘’（）《》…—\u3000")
# The most common characters of simplified and traditional texts.
_COMMON = frozenset(
    "的一是了我不人在他有这這個个上们們来來到时時大地為为子中你說说生國国年著着就那和要她出也得裡"
    "里後后自以會会家可下而過过天去能對对小多然於于心學学麼么之都好看起發发當当沒没成只如事把還还"
    "用第樣样道想作種种開开美總总從无無情己面最女但现現前些所同日手又行意動动方期它頭头經经長长兒"
    "儿回位分愛爱老因很給给名法間间斯知世什兩两次使身者被高已親亲其進进此話话常與与活正感見见明問"
    "问力理爾尔點点文幾几定本公特做外孩相西果走將将月十實实向聲声車车全信重三機机工物氣气每並并別"
    "别真打太新比才便夫再書书部水像眼等體体卻却加電电主界門门利海受聽听表德少克代員员許许先口由死"
    "安寫写性馬马光白或住難难望教命花結结樂乐色更拉東东神記记處处讓让母父應应直字場场平報报友關关"
    "放至張张認认接告入笑內内英軍军候民歲岁往何度山覺觉路帶带萬万男邊边風风解叫任金快原吃媽妈變变"
    "通師师立象數数四失滿满戰战遠远格士音輕轻目條条呢病始達达深完今提求清王化空業业思切怎非找片羅"
    "罗錢钱嗎吗語语元喜曾離离飛飞科言幹干流歡欢約约各即指合反題题必該该論论交終终林請请醫医晚製制"
    "球決决傳传畫画保讀读運运及則则房早院量苦火布品近坐產产答星精視视五連连司奇管類类朋且婚台臺夜"
    "青北隊队久乎越觀观落盡尽形影紅红爸百令周識识步希亞亚術术留市半熱热送興兴造談谈容極极隨随演收"
    "首根講讲整式取照辦办強强石古華华諸诸拿計计您裝装似足雙双妻轉转訴诉米稱称麗丽客南領领節节衣站"
    "黑刻統统斷断福城故歷历驚惊臉脸選选包緊紧爭争另建維维絕绝樹树系傷伤示願愿持千史誰谁準准聯联婦"
    "妇紀纪基買买志靜静詩诗獨独復复痛消社算義义竟確确酒需單单治卡念舉举僅仅鐘钟怕共毛句息功官待究"
    "跟穿室易遊游程號号居考突皮費费倒價价圖图具剛刚腦脑永歌響响商禮礼細细專专黃黄塊块腳脚味靈灵改"
    "據据般破引食仍存眾众注筆笔甚某沉血備备習习校默務务土微須须試试懷怀料調调廣广蘇苏顯显賽赛查密"
    "議议底列富夢梦錯错座參参八除跑亮假印設设線线溫温雖虽掉京初養养香停際际致陽阳紙纸李納纳驗验助"
    "激夠够嚴严證证帝飯饭忘趣支春集丈木研班普導导頓顿睡展跳獲获藝艺六波察群皇段急庭創创區区器謝谢"
    "弟店否害草排背止組组州朝封板角況况曲館馆育忙質质河續续哥呼若推境遇雨標标姐充圍围案倫伦護护冷"
    "警雪索劇剧啊船險险煙烟依值幫帮漢汉慢佛肯聞闻唱沙局族低玩資资屋擊击速顧顾淚泪洲團团聖圣旁堂兵"
    "七露園园牛哭旅街勞劳型烈陳陈魚鱼異异抱寶宝權权魯鲁簡简態态級级票怪尋寻殺杀律勝胜份洋範范床舞"
    "秘登樓楼貴贵責责例追較较職职屬属漸渐左錄录絲丝牙黨党繼继托趕赶章智衝冲葉叶吉賣卖堅坚喝肉遺遗"
    "救修松臨临藏擔担戲戏善衛卫藥药悲敢靠村詞词森耳差短祖雲云規规窗散迷油舊旧適适鄉乡架恩投彈弹鐵"
    "铁博雷府壓压超負负雜杂醒洗採采畢毕九冰既狀状亂乱景席珍童頂顶派素脫脱農农疑練练野按犯拍徵征壞"
    "坏骨餘余承置燈灯巨琴免環环暗換换技翻束增忍餐缺憶忆判歐欧層层付陣阵島岛項项休懂武革良惡恶戀恋"
    "委擁拥探營营退搖摇弄桌熟諾诺宣銀银勢势獎奖宮宫套康供優优課课鳥鸟降夏困劉刘罪鞋健模敗败伴守揮"
    "挥鮮鲜財财孤槍枪禁恐跡迹遍蓋盖副坦牌江順顺秋劃划授歸归浪灣湾網网訊讯霜趙赵吳吴"
)
_COMMON_SHARE, _FEW = 0.25, 8  # of text in the right encoding it is above a half; characters
_SAMPLE_BYTES = 1 << 14


class _Charset(NamedTuple):
    """A multibyte encoding, and which double bytes are its frequent characters."""

    name: str
    iconv: str
    codec: str
    level_codec: str
    first: int
    last: int


# Frequent characters are the first level of a standard: 3,755 of GB 2312, 5,401 of Big5. In text
# that is decoded in the wrong one of the two, about every second character is rare, and hardly any
# is among the most common ones, which decide short texts. Of equal guesses the first is taken.
_CHARSETS = (
    _Charset("GB18030", "GB18030", "gb18030", "gb2312", 0xB0A1, 0xD7F9),
    _Charset("Big5", "CP950", "cp950", "big5", 0xA440, 0xC67E),
    _Charset("Big5", "BIG5-HKSCS", "big5hkscs", "big5", 0xA440, 0xC67E),
    _Charset("UTF-16", "UTF-16LE", "utf-16-le", "gb2312", 0xB0A1, 0xD7F9),
    _Charset("UTF-16", "UTF-16BE", "utf-16-be", "gb2312", 0xB0A1, 0xD7F9),
)


def describe_undecodable(data: bytes, bad: int, *, first: bool, seen_utf8: bool) -> str:
    """One line about the byte at `bad` of a block that is not UTF-8, and what to do.

    `first` means that the block is the file's first. `seen_utf8` means that non-ASCII characters
    were read before it, so the file is UTF-8 and damaged here.
    """
    nul = data[bad] == 0
    found = "found a NUL byte" if nul else f"byte 0x{data[bad]:02x} is not UTF-8"
    expected = "text" if nul else "UTF-8"
    hint = _hint(data, bad, first=first, seen_utf8=seen_utf8)
    return f"{found}{f' (perhaps {hint})' if hint else ''}; expected {expected}"


def _hint(data: bytes, bad: int, *, first: bool, seen_utf8: bool) -> str:
    if first:
        for magic, hint in _MAGIC.items():
            if data.startswith(magic):
                return hint
        for mark, name in _MARKS.items():
            if data.startswith(mark):
                return _conversion(name, name)
        if data[257:262] == b"ustar":
            return "a tar archive: unpack it"
    if seen_utf8:
        return "damaged, or joined from files in several encodings: convert each by itself"
    start = 0 if bad < _SAMPLE_BYTES else data.rfind(b"\n", 0, bad) + 1
    found = _guess(data[start : start + _SAMPLE_BYTES])
    if found is not None:
        return _conversion(*found)
    if data[bad] == 0:
        return "no text at all"
    return "another encoding: `iconv -f ENCODING -t UTF-8 OLD > NEW` converts it"


def _conversion(name: str, iconv: str) -> str:
    return f"{name}: iconv -f {iconv} -t UTF-8 OLD > NEW"


def _guess(sample: bytes) -> tuple[str, str] | None:
    """The likeliest encoding and iconv's name for it, or None."""
    charsets: tuple[_Charset, ...] = _CHARSETS
    if b"\0" in sample:  # in text, the high bytes of ASCII in UTF-16
        zeros = [sample[side::2].count(0) for side in (0, 1)]
        if max(zeros) > 4 * min(zeros):
            return "UTF-16", "UTF-16BE" if zeros[0] > zeros[1] else "UTF-16LE"
        charsets = tuple(charset for charset in charsets if charset.name == "UTF-16")
    scores = {charset: _score(sample, charset) for charset in charsets}
    best = max(scores, key=lambda charset: sum(scores[charset][:2]))
    frequent, common, count = scores[best]
    is_likely = frequent > 0.5 and (common > _COMMON_SHARE or count < _FEW)
    return (best.name, best.iconv) if is_likely else None


def _score(sample: bytes, charset: _Charset) -> tuple[float, float, int]:
    """The shares of frequent and of most common characters among the non-ASCII ones; their number.

    Zeros if the sample can't be decoded.
    """
    decoder = codecs.getincrementaldecoder(charset.codec)()
    try:
        text = decoder.decode(sample)  # the last character may be cut off
    except UnicodeDecodeError:
        return 0.0, 0.0, 0
    characters = [c for c in text if not c.isascii()]
    if not characters or any(c < " " and not c.isspace() for c in text):
        return 0.0, 0.0, 0
    common = [c in _COMMON or c in _PUNCTUATION for c in characters]
    frequent = sum(
        known or _is_frequent(c, charset) for c, known in zip(characters, common, strict=True)
    )
    return frequent / len(characters), sum(common) / len(characters), len(characters)


def _is_frequent(character: str, charset: _Charset) -> bool:
    try:
        code = character.encode(charset.level_codec)
    except UnicodeEncodeError:
        return False
    return len(code) == 2 and charset.first <= int.from_bytes(code, "big") <= charset.last
