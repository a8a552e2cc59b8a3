"""Every string of the page, in English and Turkish; a test keeps the table complete."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["LANGUAGES", "STRINGS", "Texts", "choose_language"]

LANGUAGES = ("en", "tr")

# Key: (English, Turkish). {name} stands for a value. A string that depends on a number has a second form, key_one.
STRINGS: dict[str, tuple[str, str]] = {
    # The header, its menu and the dialogs.
    "answers_with": ("Model: {model}", "Model: {model}"),
    "toy": (
        "This is a toy model: it only knows moving shapes and simple sounds. Its answers about real videos are wrong.",
        "Bu bir deneme modelidir: yalnızca hareketli şekilleri ve basit sesleri tanır. "
        "Gerçek videolara verdiği yanıtlar yanlıştır.",
    ),
    "help": ("Help", "Yardım"),
    "help_title": ("How to use this page", "Bu sayfa nasıl kullanılır"),
    "help_attach": (
        "Attach videos, images or audio files with +, drop them anywhere, or paste them. Then ask a question.",
        "+ ile video, görsel veya ses dosyası ekleyin, sayfaya sürükleyin ya da yapıştırın. Sonra sorunuzu yazın.",
    ),
    "help_viewer": (
        "The viewer shows what the model gets: each frame and each audio segment with its time. "
        "A bar is its share of the attention. Click a frame, or a time in an answer, to go there in the player.",
        "Görüntüleyici, modele verilenleri gösterir: her kare ve her ses bölümü, zamanıyla birlikte. "
        "Çubuk, dikkatten aldığı paydır. Oynatıcıda o ana gitmek için bir kareye ya da yanıttaki bir zamana tıklayın.",
    ),
    "help_keys": (
        "Enter sends, Shift+Enter starts a new line, Escape closes what is open or stops the answer.",
        "Enter gönderir, Shift+Enter yeni satıra geçer, Escape açık olanı kapatır ya da yanıtı durdurur.",
    ),
    "help_limits": (
        "Limits: {megabytes} MB and {minutes} minutes for each file, {files} files in a conversation.",
        "Sınırlar: dosya başına {megabytes} MB ve {minutes} dakika, bir konuşmada {files} dosya.",
    ),
    "help_private": (
        "The conversation belongs to this tab. It is deleted when the tab is closed; export it to keep it.",
        "Konuşma bu sekmeye aittir ve sekme kapanınca silinir. Saklamak için dışa aktarın.",
    ),
    "help_paper": ("Paper: Video-LLaMA (arXiv 2306.02858)", "Makale: Video-LLaMA (arXiv 2306.02858)"),
    "licence": ("Licence", "Lisans"),
    "licence_code": (
        "This program: Apache License 2.0.",
        "Bu program: Apache Lisansı 2.0.",
    ),
    "licence_weights": (
        "Weights have licences of their own. LLaMA 2 has Meta's community licence; ImageBind, the audio encoder of the "
        "published checkpoints, may be used for non-commercial purposes only (CC BY-NC-SA 4.0).",
        "Ağırlıkların kendi lisansları vardır. LLaMA 2, Meta'nın topluluk lisansıyla gelir; yayımlanan modellerin ses "
        "kodlayıcısı ImageBind yalnızca ticari olmayan amaçlarla kullanılabilir (CC BY-NC-SA 4.0).",
    ),
    "theme": ("Light or dark colours", "Açık ya da koyu renkler"),
    "language": ("Türkçe", "English"),
    "language_label": ("Türkçe: switch to Turkish", "English: İngilizceye geç"),
    "menu": ("Conversation menu", "Konuşma menüsü"),
    "new": ("New conversation", "Yeni konuşma"),
    "export_markdown": ("Export as Markdown", "Markdown olarak dışa aktar"),
    "export_json": ("Export as JSON", "JSON olarak dışa aktar"),
    "close": ("Close", "Kapat"),
    "cancel": ("Cancel", "Vazgeç"),
    "confirm_title": ("Delete this conversation?", "Bu konuşma silinsin mi?"),
    "confirm_text": (
        "Its files, questions and answers are removed and cannot be restored. Export it first to keep it.",
        "Dosyaları, soruları ve yanıtları silinir ve geri getirilemez. Saklamak için önce dışa aktarın.",
    ),
    "confirm_yes": ("Delete", "Sil"),
    # The empty page.
    "welcome": ("Ask about a video, an image or audio", "Bir video, görsel ya da ses hakkında sorun"),
    "welcome_hint": (
        "Attach a file with +, drop it anywhere or paste it. Or try an example:",
        "+ ile bir dosya ekleyin, sayfaya sürükleyin ya da yapıştırın. Veya bir örnek deneyin:",
    ),
    "examples": ("Examples", "Örnekler"),
    # The composer.
    "question": ("Question", "Soru"),
    "question_hint": ("Ask about the attached files …", "Ekli dosyalar hakkında sorun …"),
    "add": ("Add a file or a recording", "Dosya ya da kayıt ekle"),
    "add_file": ("Files …", "Dosyalar …"),
    "add_camera": ("Record with the camera", "Kamerayla kaydet"),
    "add_microphone": ("Record with the microphone", "Mikrofonla kaydet"),
    "settings": ("Settings", "Ayarlar"),
    "send": ("Send", "Gönder"),
    "stop": ("Stop", "Durdur"),
    "drop": ("Drop to attach", "Eklemek için bırakın"),
    "uploading": ("Uploading {percent} %", "Yükleniyor: %{percent}"),
    "uploaded": ("Waiting …", "Bekliyor …"),
    "remove": ("Remove {name}", "{name} dosyasını kaldır"),
    "attached": ("Attached files", "Ekli dosyalar"),
    "too_large": (
        "{name}: {size} MB is too large (at most {most} MB)",
        "{name}: {size} MB çok büyük (en çok {most} MB)",
    ),
    "upload_failed": (
        "{name} could not be uploaded: {reason}",
        "{name} yüklenemedi: {reason}",
    ),
    "connection": ("no connection to the server", "sunucuya bağlanılamıyor"),
    # Recording.
    "record_camera": ("Record a video", "Video kaydet"),
    "record_microphone": ("Record audio", "Ses kaydet"),
    "record": ("Record", "Kaydı başlat"),
    "record_end": ("Stop and attach", "Durdur ve ekle"),
    "no_device": (
        "The browser gave no access to the camera or the microphone: {reason}",
        "Tarayıcı kameraya ya da mikrofona erişim vermedi: {reason}",
    ),
    # While something is done.
    "loading": ("Loading the model … {seconds} s", "Model yükleniyor … {seconds} sn"),
    "not_loaded": (
        "The model could not be loaded; the terminal says why.",
        "Model yüklenemedi; nedeni terminalde yazıyor.",
    ),
    "decoding": ("Decoding {name} …", "{name} çözülüyor …"),
    "encoding": ("Encoding the frames and the audio of {name} …", "{name}: kareler ve ses kodlanıyor …"),
    "reading": ("Reading the question …", "Soru okunuyor …"),
    "queue": ("Waiting: {count} requests before yours", "Bekleniyor: sizden önce {count} istek var"),
    "queue_one": ("Waiting: one request before yours", "Bekleniyor: sizden önce bir istek var"),
    # The conversation.
    "conversation": ("Conversation", "Konuşma"),
    "open_file": ("Show {name} in the viewer", "{name} dosyasını görüntüleyicide göster"),
    "no_file": (
        "No file is attached: the answer is not about any file. Attach one with +.",
        "Ekli dosya yok: yanıt hiçbir dosya hakkında değil. + ile bir dosya ekleyin.",
    ),
    "no_answer": ("(no answer)", "(yanıt yok)"),
    "copy": ("Copy", "Kopyala"),
    "copied": ("Copied", "Kopyalandı"),
    "retry": ("Answer again", "Yeniden yanıtla"),
    "edit": ("Edit", "Düzenle"),
    "edit_question": ("Edit the question", "Soruyu düzenle"),
    "undo": ("Undo", "Geri al"),
    "ask_again": ("Ask again", "Yeniden sor"),
    "go_to": ("Go to {time} in the player", "Oynatıcıda {time} anına git"),
    # The viewer.
    "files": ("Files of the conversation", "Konuşmadaki dosyalar"),
    "fold": ("Show or hide the viewer", "Görüntüleyiciyi göster ya da gizle"),
    "one_image": ("one image", "tek görsel"),
    "frames_seen": ("{count} frames seen", "{count} kare görüldü"),
    "frames_seen_one": ("1 frame seen", "1 kare görüldü"),
    "all_audio": ("all {seconds} s of audio", "{seconds} sn sesin tamamı"),
    "audio_segments": ("{count} × 2 s of {seconds} s of audio", "{seconds} sn sesten {count} × 2 sn"),
    "no_audio_track": ("no audio track", "ses parçası yok"),
    "audio_unused": ("audio not used", "ses kullanılmıyor"),
    "no_audio_branch": ("the model has no audio branch", "modelin ses dalı yok"),
    "frames_title": ("Frames that the model gets", "Modele verilen kareler"),
    "audio_title": ("Audio segments that the model gets", "Modele verilen ses bölümleri"),
    "bars": ("bars: share of attention", "çubuklar: dikkat payı"),
    "seek": ("click to go there", "o ana gitmek için tıklayın"),
    "frame_at": (
        "Frame at {seconds} seconds, {share} % of the attention",
        "{seconds}. saniyedeki kare, dikkatin %{share} kadarı",
    ),
    "audio_at": (
        "Audio at {seconds} seconds, {share} % of the attention",
        "{seconds}. saniyedeki ses, dikkatin %{share} kadarı",
    ),
    "unplayable_video": (
        "Your browser cannot play this file; the frames below are what the model gets.",
        "Tarayıcınız bu dosyayı oynatamıyor; aşağıdaki kareler modele verilenlerdir.",
    ),
    "unplayable_audio": (
        "Your browser cannot play this file; below is the audio that the model gets.",
        "Tarayıcınız bu dosyayı oynatamıyor; aşağıda modele verilen ses var.",
    ),
    # The settings.
    "style": ("Style of the answers", "Yanıt biçimi"),
    "precise": ("Precise", "Kesin"),
    "balanced": ("Balanced", "Dengeli"),
    "creative": ("Creative", "Yaratıcı"),
    "frames": ("Frames", "Kare sayısı"),
    "frames_info": ("of the next video; more show faster actions", "sonraki videodan; hızlı hareketlerde artırın"),
    "use_audio": ("Use the audio track", "Ses parçasını kullan"),
    "use_audio_info": ("of the next video", "sonraki videonun"),
    "advanced": ("Advanced settings", "Gelişmiş ayarlar"),
    "temperature": ("Temperature", "Sıcaklık"),
    "temperature_info": ("0 always takes the most likely word", "0 her zaman en olası sözcüğü seçer"),
    "top_p": ("Top-p", "Top-p"),
    "top_p_info": ("used with a temperature above 0", "sıcaklık 0'dan büyükken geçerlidir"),
    "beams": ("Beams", "Işın sayısı"),
    "beams_info": ("above 1, the answer is shown when it is complete", "1'den büyükse yanıt bitince gösterilir"),
    "longest": ("Max new tokens", "En çok yeni belirteç"),
    "longest_info": ("the longest an answer can be", "yanıtın en fazla uzunluğu (token)"),
    # The exported conversation.
    "export_title": ("Conversation with {model}", "{model} ile konuşma"),
    "export_date": ("Date", "Tarih"),
    "export_settings": ("Settings", "Ayarlar"),
    "export_file": ("File", "Dosya"),
    "export_question": ("Question", "Soru"),
    "export_answer": ("Answer", "Yanıt"),
}


@dataclass(frozen=True)
class Texts:
    """The strings of one language.

    Args:
        language: one of `LANGUAGES`; anything else is English.
    """

    language: str = LANGUAGES[0]

    def __call__(self, key: str, count: int | None = None, **values: Any) -> str:
        """Return a string with its values filled in; `count` chooses between the forms for one and for many."""
        if count is not None:
            values["count"] = count
            if count == 1 and f"{key}_one" in STRINGS:
                key = f"{key}_one"
        column = 0
        if self.language in LANGUAGES:
            column = LANGUAGES.index(self.language)
        return STRINGS[key][column].format(**values)


def choose_language(wanted: Any, accepted: str | None) -> str:
    """Return the language of a visitor: the one chosen on the page, else the browser's first that the page has.

    Args:
        wanted: what the page sent.
        accepted: the header `Accept-Language`, with the preferred language first.
    """
    if wanted in LANGUAGES:
        return str(wanted)
    for item in (accepted or "").lower().split(","):
        language = item.strip().partition(";")[0].partition("-")[0]
        if language in LANGUAGES:
            return language
    return LANGUAGES[0]
